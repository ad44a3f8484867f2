"""The content of tokenizer.json with fewer tokens: what a token is made of, and the file without the others.

BPE merges the pair of lowest rank until no pair is left. Within one final token of a text these merges are those that make the
token of its own characters alone, because a pair across its borders was never the lowest. So a text of kept tokens is cut as
before if each kept token's own merges are kept, and merges that are not needed for that do no harm. Unigram takes the best
path among all, which stays the best while its tokens stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import read_json, shown
from compresskit.errors import CheckpointError, UnsupportedArchitecture

FILE = "tokenizer.json"
BYTE_LEVEL = "ByteLevel"
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
"""Keys of BPE that give a character another token inside a word than alone."""
SPACE = "▁"
"""What stands for a space; made of its bytes it would come back as itself."""
AROUND = ("post_processor", "padding")
"""Parts of the file that put tokens around a text."""
NUMBERED = ("sep", "cls")
"""Keys of post-processors with [token, id]."""


@dataclass(frozen=True)
class TokenizerFile:
    """The content of a tokenizer.json that can be cut."""

    path: Path
    content: dict[str, Any]

    @cached_property
    def token_ids(self) -> dict[str, int]:
        """The model's own tokens and their numbers."""
        vocabulary = self.content["model"]["vocab"]
        if isinstance(vocabulary, dict):
            return dict(vocabulary)
        return {piece: number for number, (piece, _) in enumerate(vocabulary)}

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The model's own tokens by number."""
        return {number: token for token, number in self.token_ids.items()}

    @cached_property
    def added(self) -> set[int]:
        """Numbers of the added tokens, which are found before any merging."""
        return {each["id"] for each in self.content.get("added_tokens") or []}

    @cached_property
    def merges(self) -> dict[tuple[str, str], int]:
        """Rank of every pair that BPE merges; empty for Unigram."""
        pairs = self.content["model"].get("merges") or []
        return {_pair(pair): rank for rank, pair in enumerate(pairs)}

    def smallest(self) -> set[int]:
        """Numbers of what every text can be cut into: single characters of ASCII or of the byte alphabet, bytes, the unknown."""
        found = {number for token, number in self.token_ids.items() if _is_byte(token) or self._is_single(token)}
        unknown = self.content["model"].get("unk_token")
        if unknown in self.token_ids:
            found.add(self.token_ids[unknown])
        if (number := self.content["model"].get("unk_id")) is not None:
            found.add(number)
        return found

    def put_around(self) -> set[int]:
        """Numbers of the tokens that the file puts before, after or between texts."""
        found: set[int] = set()

        def seen(number: int) -> int:
            found.add(number)
            return number

        for key in AROUND:
            _renumbered(self.content.get(key), seen)
        return found

    def _is_single(self, token: str) -> bool:
        return len(token) == 1 and (token.isascii() or token == SPACE or BYTE_LEVEL in self._steps)

    @cached_property
    def _steps(self) -> set[str]:
        return set(_kinds(self.content))

    def closure(self, number: int) -> set[int]:
        """A token with those that merging makes it of."""
        token = self.tokens.get(number)
        if token is None or not self.merges:
            return {number}
        return {self.token_ids[part] for part in parts(token, self.merges) if part in self.token_ids} | {number}


def open_tokenizer_file(folder: Path) -> TokenizerFile:
    """Read a tokenizer.json and refuse what cannot be cut safely.

    Returns:
        The file.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UnsupportedArchitecture: it is neither BPE nor Unigram, or has no bytes for what no token is left for.
    """
    path = folder / FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: has no {FILE}; save the tokenizer with transformers' save_pretrained first")
    found = TokenizerFile(path, read_json(path))
    try:
        _check(found)
        _check_numbers(found)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: no usable tokenizer ({type(error).__name__}: {error}); restore the file") from error
    return found


def _check_numbers(file: TokenizerFile) -> None:
    if not all(type(number) is int and number >= 0 for number in (*file.tokens, *file.added, *file.put_around())):
        raise ValueError("a token's number is none")
    for pair in file.merges:
        if not all(isinstance(part, str) for part in pair):
            raise ValueError("a merge is no pair of tokens")


def _check(file: TokenizerFile) -> None:
    model = file.content["model"]
    kind = model.get("type")
    if kind not in ("BPE", "Unigram"):
        raise UnsupportedArchitecture(f"{file.path}: a tokenizer of type {shown(kind)}; BPE and Unigram can be cut")
    if affix := next((key for key in AFFIXES if model.get(key)), None):
        raise UnsupportedArchitecture(
            f"{file.path}: its tokens depend on their place in a word ({affix}), so none can be removed"
        )
    if BYTE_LEVEL not in set(_kinds(file.content)) and not model.get("byte_fallback"):
        raise UnsupportedArchitecture(
            f"{file.path}: has no bytes to cut a text into for which no token is left, so none can be removed"
        )


def _kinds(part: Any) -> Iterator[str]:
    """Types of the normalizers and pre-tokenizers, those inside others included."""
    if isinstance(part, dict):
        for key in ("normalizer", "pre_tokenizer", "normalizers", "pretokenizers"):
            yield from _kinds(part.get(key))
        if isinstance(part.get("type"), str):
            yield part["type"]
    elif isinstance(part, list):
        for each in part:
            yield from _kinds(each)


def _pair(stored: Any) -> tuple[str, str]:
    """A merge, stored as a list of two or, in older files, as two words."""
    first, second = stored.split(" ") if isinstance(stored, str) else stored
    return first, second


def _is_byte(token: str) -> bool:
    """Whether a token stands for one byte, as <0x0A> does."""
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def parts(token: str, merges: Mapping[tuple[str, str], int]) -> set[str]:
    """Follow BPE from a token's characters to the token.

    Returns:
        All that it makes on the way, characters and token included. Where no merges make the token (an added one, or one that
        only `ignore_merges` finds) it alone.
    """
    symbols, found = list(token), set(token)
    while len(symbols) > 1:
        ranks = [(merges[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in merges]
        if not ranks:
            return {token}
        _, place = min(ranks)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1]]
        found.add(symbols[place])
    return found


def cut(file: TokenizerFile, kept: Sequence[int]) -> dict[str, Any]:
    """The content of the file with the kept tokens alone, numbered anew; `kept` ascending."""
    number = {old: new for new, old in enumerate(kept)}
    content = copy.deepcopy(file.content)
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: number[old] for token, old in file.token_ids.items() if old in number}
        known: Collection[str] = model["vocab"]
        model["merges"] = [pair for pair in model["merges"] if _stays(_pair(pair), known)]
    else:
        model["vocab"] = [entry for old, entry in enumerate(model["vocab"]) if old in number]
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
    for each in content.get("added_tokens") or []:
        each["id"] = number[each["id"]]
    around = {key: _renumbered(content.get(key), number.__getitem__) for key in AROUND}
    return content | {key: part for key, part in around.items() if part is not None}


def _stays(pair: tuple[str, str], known: Collection[str]) -> bool:
    return pair[0] in known and pair[1] in known and "".join(pair) in known


def _renumbered(part: Any, change: Callable[[int], int]) -> Any:
    """A post-processor or a padding whose tokens have gone through `change`."""
    if isinstance(part, list):
        return [_renumbered(each, change) for each in part]
    if not isinstance(part, dict):
        return part
    found: dict[str, Any] = {}
    for key, value in part.items():
        if key == "ids":
            found[key] = [change(each) for each in value]
        elif key in NUMBERED:
            found[key] = [value[0], change(value[1])]
        else:
            found[key] = change(value) if key == "pad_id" else _renumbered(value, change)
    return found
