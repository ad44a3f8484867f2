"""How a byte-level tokenizer splits text before it merges, by llama.cpp's names for it (`tokenizer.ggml.pre`).

llama.cpp has the patterns built in, so that a file only names one. The table holds those whose tokens benchmarks/gguf_files.py
found equal; another tokenizer needs `--pre NAME`. Patterns: tokenizer.json of the models, and llama-vocab.cpp of llama.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.errors import RequestError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_WITH_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str) -> str:
    """Words by their case, each with an ending."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}|"


_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_PATTERNS = {
    _WORDS + r"\p{N}{1,3}" + _REST: {True: "llama-bpe", False: "smaug-bpe"},
    _WORDS + r"\p{N}" + _REST: {False: "qwen2"},
    _cased("") + r"\p{N}" + _REST_WITH_SLASH: {True: "tekken"},
    _cased(_ENDING) + r"\p{N}{1,3}" + _REST_WITH_SLASH: {True: "gpt-4o"},
}
"""By the one pattern of the splits, and by whether whole words that are tokens are taken before any merge."""
_BYTES = ("ByteLevel", False, False)
_BYTES_OF_WORDS = ("ByteLevel", False, True)
_NORMALIZERS = (None, "NFC")
"""Those that leave nearly all text as it is; llama.cpp has none."""


def splitting(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the splitting of a byte-level tokenizer, given as tokenizer.json; None if it is not known."""
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    steps = [_step(each) for each in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")]
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    if normalizer not in _NORMALIZERS:
        return None
    if not whole_words and steps == [_BYTES_OF_WORDS]:
        return "gpt-2"
    if not whole_words and steps == [("Digits", True), _BYTES_OF_WORDS]:
        return "smollm"
    if len(steps) == 2 and steps[0][0] == "Split" and steps[1] == _BYTES:
        return _PATTERNS.get(steps[0][1], {}).get(whole_words)
    return None


def is_byte_level(tokenizer: Mapping[str, Any]) -> bool:
    """Whether its tokens are bytes and what they merge to."""
    return any(each.get("type") == "ByteLevel" for each in _flat(tokenizer.get("pre_tokenizer"), "pretokenizers"))


def unknown_splitting(folder: object) -> RequestError:
    """The error of a splitting that is not in the table."""
    known = sorted({"gpt-2", "smollm", *(name for names in _PATTERNS.values() for name in names.values())})
    return RequestError(
        f"{folder}: splits text in a way that is not in the table ({', '.join(known)}); pass llama.cpp's name for it with "
        "--pre NAME, or leave the tokenizer out with --no-tokenizer"
    )


def flat_normalizers(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The single steps of normalisation, in order."""
    return _flat(tokenizer.get("normalizer"), "normalizers")


def flat_splits(tokenizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The single steps of splitting, in order."""
    return _flat(tokenizer.get("pre_tokenizer"), "pretokenizers")


def _flat(found: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if found is None:
        return []
    return [one for each in found[key] for one in _flat(each, key)] if found.get("type") == "Sequence" else [found]


def _step(found: dict[str, Any]) -> tuple[Any, ...]:
    """A step by its name and the settings that matter here."""
    kind = found.get("type")
    if kind == "ByteLevel":
        return kind, bool(found.get("add_prefix_space")), bool(found.get("use_regex", True))
    if kind == "Digits":
        return kind, bool(found.get("individual_digits"))
    if kind == "Split" and found.get("behavior") == "Isolated" and not found.get("invert"):
        return kind, (found.get("pattern") or {}).get("Regex")
    return kind, "with other settings"
