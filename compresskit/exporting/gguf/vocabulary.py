"""A tokenizer as keys of GGUF: tokens, merges or scores, special tokens, chat template.

llama.cpp has two of the kinds that models here use. `gpt2`: merges of bytes, in their order. `llama`: merges of characters
with bytes for what is unknown, as SentencePiece makes them; there the order of merges is a score of the merged token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.small_files import shown
from compresskit.errors import RequestError
from compresskit.exporting.gguf.splitting import flat_normalizers, flat_splits, is_byte_level, splitting, unknown_splitting
from compresskit.models.tokenizer import open_tokenizer, tokenizing

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of tokens, as llama.cpp numbers them."""
SPACE = "\u2581"
"""What SentencePiece writes for a space."""
SPECIAL = ("bos", "eos", "unk", "pad")
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}
NEVER_MERGED = -1e9
"""Score of a token that no merge makes."""
COMBINING = "llama.cpp splits words with combining marks (Hindi, Thai) otherwise than tokenizers of the kind {name}"
REMEDY = "pass --no-tokenizer to leave it out"


@dataclass(frozen=True)
class Vocabulary:
    """What a file holds of a tokenizer."""

    model: str
    """gpt2 or llama."""
    pre: str
    tokens: list[str]
    """By id, one for every row of the embedding."""
    types: list[int]
    merges: list[str]
    """Of gpt2."""
    scores: list[float]
    """Of llama."""
    special: dict[str, int]
    """Ids of the tokens of `SPECIAL` that there are."""
    begins: bool
    """Whether a text begins with the bos token."""
    ends: bool
    """Whether it ends with the eos token."""
    space_first: bool
    """Whether a space is put before the text; of llama."""
    templates: dict[str, str]
    """Chat templates by name; the usual one is `default`."""

    def add_to(self, writer: GGUFWriter) -> None:
        """Add the keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.model == "gpt2":
            writer.add_token_merges(self.merges or [""])  # llama.cpp takes no tokenizer without a list of merges
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.space_first)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.begins)
        writer.add_add_eos_token(self.ends)
        if "default" in self.templates:
            writer.add_chat_template(self.templates["default"])
        others = sorted(self.templates.keys() - {"default"})
        for name in others:
            writer.add_string(f"tokenizer.chat_template.{name}", self.templates[name])
        if others:
            writer.add_array("tokenizer.chat_templates", others)


def title(folder: Path) -> str:
    """A model's name: its folder's, or in the Hub's cache, where the folder is a commit, that of the repository."""
    repository = folder.resolve().parent.parent.name
    in_cache = folder.resolve().parent.name == "snapshots" and repository.startswith("models--")
    return repository.rpartition("--")[2] if in_cache else folder.name


def name_of_model(name: str, family: str, tokens: Iterable[str]) -> str:
    """The name that a file states. llama.cpp strips spaces after special tokens in models named phi-3, and only there.

    Such a name without Phi-3's tokens does not load, so it is spelled otherwise; with them, Phi-3 gets it.

    Returns:
        The folder's name, or that with a change.
    """
    named, known = re.search("phi-?3", name, re.IGNORECASE), PHI3_TOKENS.issubset(tokens)
    if named and not known:
        return re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE)
    return f"phi-3 {name}" if known and family == "phi3" and not named else name


def read_vocabulary(folder: Path, rows: int, pre: str | None) -> tuple[Vocabulary, list[str]]:
    """Read the tokenizer in a folder for an embedding of so many rows.

    `pre`: llama.cpp's name for how a byte-level tokenizer splits text; None to find it.

    Returns:
        (the vocabulary, notes for the user).

    Raises:
        CheckpointError: there is no usable tokenizer.
        RequestError: llama.cpp has no such kind of tokenizer, or the splitting is not known.
    """
    tokenizer = open_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(f"{folder}: its tokenizer has no tokenizer.json, which is what is exported; {REMEDY}")
    with tokenizing(folder):
        found: dict[str, Any] = json.loads(backend.to_str())
        ids = [tokenizer("a", add_special_tokens=added)["input_ids"] for added in (False, True)]
    kind, name = _kind(found, folder, pre)
    tokens, types, notes = _tokens(found, rows, kind)
    notes += [COMBINING.format(name=name)] if name in ("tekken", "gpt-4o") else []
    special = {each: number for each in SPECIAL if (number := getattr(tokenizer, f"{each}_token_id")) is not None}
    merges = [each if isinstance(each, str) else " ".join(each) for each in found["model"]["merges"]]
    return Vocabulary(
        kind, name, tokens, types, merges if kind == "gpt2" else [], _scores(tokens, found) if kind == "llama" else [],
        {each: number for each, number in special.items() if number < rows},
        ids[1][:1] == [special.get("bos")] and ids[0][:1] != ids[1][:1],
        ids[1][-1:] == [special.get("eos")] and ids[0][-1:] != ids[1][-1:],
        _space_first(found), _templates(tokenizer),
    ), notes  # fmt: skip


def _kind(found: Mapping[str, Any], folder: Path, pre: str | None) -> tuple[str, str]:
    """(tokenizer.ggml.model, tokenizer.ggml.pre) of a tokenizer, given as tokenizer.json."""
    model = found["model"]
    if model.get("type") != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise RequestError(f"{folder}: its tokenizer is {shown(model.get('type'))}, llama.cpp here takes merges (BPE); {REMEDY}")
    if is_byte_level(found):
        name = pre or splitting(found)
        if name is None:
            raise unknown_splitting(folder)
        return "gpt2", name
    if not model.get("byte_fallback"):
        raise RequestError(f"{folder}: its tokenizer merges characters without bytes for unknown ones; {REMEDY}")
    if pre is not None:
        raise RequestError(f"--pre {pre}: {folder} has a tokenizer like SentencePiece's, which splits in one way; drop --pre")
    return "llama", "default"


def _tokens(found: Mapping[str, Any], rows: int, kind: str) -> tuple[list[str], list[int], list[str]]:
    """Tokens and their types by id, one a row of the embedding, and notes."""
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types, beyond = [UNUSED] * rows, 0
    for token, number in found["model"]["vocab"].items():
        if number < rows:
            tokens[number], types[number] = token, _type_of(token, kind, found["model"].get("unk_token"))
        beyond += number >= rows
    for added in found.get("added_tokens") or ():
        number, token = added["id"], added["content"]
        if number >= rows:
            beyond += token not in found["model"]["vocab"]
            continue
        unknown = kind == "llama" and token == found["model"].get("unk_token")
        types[number] = UNKNOWN if unknown else CONTROL if added["special"] else USER_DEFINED
        tokens[number] = token if added["special"] else token.replace(SPACE, " ")
    return tokens, types, [f"{beyond} tokens have no row in the embedding and are left out"] if beyond else []


def _type_of(token: str, kind: str, unknown: str | None) -> int:
    if kind == "gpt2":
        return NORMAL
    is_byte = len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")
    return UNKNOWN if token == unknown else BYTE if is_byte else NORMAL


def _scores(tokens: list[str], found: Mapping[str, Any]) -> list[float]:
    """Scores by id: the earlier a token is merged, the higher."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(found["model"]["merges"]):
        ranks.setdefault(merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge), rank)
    return [-float(ranks[token]) if token in ranks else NEVER_MERGED for token in tokens]


def _space_first(found: Mapping[str, Any]) -> bool:
    """Whether a tokenizer like SentencePiece's puts a space before the text."""
    prepended = any(each.get("type") == "Prepend" and each.get("prepend") == SPACE for each in flat_normalizers(found))
    schemes = [each.get("prepend_scheme", "always") for each in flat_splits(found) if each.get("type") == "Metaspace"]
    return prepended or any(scheme in ("always", "first") for scheme in schemes)


def _templates(tokenizer: Any) -> dict[str, str]:
    given = getattr(tokenizer, "chat_template", None) or {}
    return {"default": given} if isinstance(given, str) else dict(given)
