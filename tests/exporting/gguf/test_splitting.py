"""exporting/gguf/splitting.py: llama.cpp's name of a splitting. Their tokens are compared in benchmarks/gguf_files.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Punctuation, Sequence, Split

from compresskit.exporting.gguf.splitting import splitting

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS, BYTES = ByteLevel(add_prefix_space=False), ByteLevel(add_prefix_space=False, use_regex=False)


def described(steps: PreTokenizer, normalizer: Any = None, whole_words: bool = False) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE({"a": 0}, [], ignore_merges=whole_words))
    tokenizer.pre_tokenizer = steps
    if normalizer:
        tokenizer.normalizer = normalizer
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


@pytest.mark.parametrize(("steps", "whole_words", "name"), [
    (WORDS, False, "gpt-2"),
    (Sequence([Digits(True), WORDS]), False, "smollm"),
    (Sequence([Split(Regex(LLAMA3), "isolated"), BYTES]), True, "llama-bpe"),
    (Sequence([Split(Regex(LLAMA3), "isolated"), BYTES]), False, "smaug-bpe"),
    (Sequence([Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), BYTES]), False, "qwen2"),
    (ByteLevel(add_prefix_space=True), False, None),
    (Sequence([Digits(False), WORDS]), False, None),
    (Sequence([Punctuation(), WORDS]), False, None),
    (Sequence([Split(Regex(LLAMA3), "removed"), BYTES]), True, None),
    (Sequence([Split(Regex(LLAMA3 + "|x"), "isolated"), BYTES]), True, None),
    (WORDS, True, None),
])  # fmt: skip
def test_a_splitting_has_llama_cpp_s_name_only_where_every_step_is_known(
    steps: PreTokenizer, whole_words: bool, name: str | None
) -> None:
    assert splitting(described(steps, whole_words=whole_words)) == name


def test_normalisation_that_changes_text_is_not_known() -> None:
    assert splitting(described(WORDS, normalizers.NFC())) == "gpt-2"
    assert splitting(described(WORDS, normalizers.Lowercase())) is None
