"""Which tokens stay: those that must, then those of the texts by frequency, those of the scripts, then the first of the rest."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping

from compresskit.errors import RequestError
from compresskit.pruning.vocabulary.method import Vocabulary

PART = "\ufffd"
"""What a tokenizer decodes bytes to that are no whole character."""
Closure = Callable[[int], set[int]]
"""Function from a token to the tokens that it needs, itself included."""


def kept_tokens(
    method: Vocabulary, required: Collection[int], counts: Mapping[int, int], scripts: Collection[int], known: Collection[int],
    closure: Closure,
) -> list[int]:  # fmt: skip
    """Choose the tokens that stay.

    `required`, `scripts`, `known`: tokens that must stay, that belong to the scripts, and all; `counts`: how often the texts
    have each.

    Returns:
        The tokens, ascending.

    Raises:
        RequestError: the share that is to go leaves too few for what must stay.
    """
    wanted = sorted((token for token in counts if token in known), key=lambda token: (-counts[token], token))
    found = set[int]().union(*(closure(token) for token in required))
    most = len(known) if method.sparsity is None else round((1 - method.sparsity) * len(known))
    most = max(most // method.round_to * method.round_to, 1)
    if method.sparsity is not None and len(found) > most:
        raise RequestError(
            f"--sparsity {method.sparsity:g}: leaves {most:,} of {len(known):,} tokens, and {len(found):,} must stay (bytes, "
            "special tokens, the chat template); lower it"
        )
    _add(found, [*wanted, *sorted(scripts)], most if method.sparsity is not None else len(known), closure)
    full = most if method.sparsity is not None else -(-len(found) // method.round_to) * method.round_to
    _add(found, sorted(known), min(full, len(known)), closure)
    return sorted(found)


def _add(found: set[int], tokens: Iterable[int], most: int, closure: Closure) -> None:
    """Add tokens with what they need, in order, while they fit."""
    for token in tokens:
        if len(found) >= most:
            return
        needed = closure(token) - found if token not in found else set()
        if len(found) + len(needed) <= most:
            found |= needed


def of_scripts(texts: Mapping[int, str], scripts: Collection[str]) -> set[int]:
    """Find the tokens of these scripts: text whose letters all have a Unicode name that begins with one of them.

    `texts`: what each token stands for. Parts of characters may belong to any script, and are among them.

    Returns:
        The tokens.
    """
    prefixes = tuple(f"{script.upper()} " for script in scripts)
    return {token for token, text in texts.items() if prefixes and _is_of(text, prefixes)}


def _is_of(text: str, prefixes: tuple[str, ...]) -> bool:
    foreign = [letter for letter in text.replace(PART, "") if not letter.isascii()]
    return all(letter.isalpha() and unicodedata.name(letter, "").startswith(prefixes) for letter in foreign)


def check_scripts(scripts: Collection[str]) -> None:
    """Raise RequestError for a script that no letter's Unicode name begins with."""
    known = {unicodedata.name(chr(code), "").partition(" ")[0] for code in range(0x20000) if chr(code).isalpha()}
    for script in scripts:
        if script.upper() not in known:
            raise RequestError(
                f"--keep-scripts {script}: begins no letter's Unicode name; write for example latin, greek or hiragana"
            )
