"""exporting/gguf/vocabulary.py: tokens, scores and special tokens, merged by their scores as llama.cpp does. Oracle."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from gguf_files import keys_of
from tiny_models import make_model
from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Whitespace
from transformers import PreTrainedTokenizerFast

from compresskit.exporting.gguf.vocabulary import name_of_model, title

PIECES = ["▁", "t", "h", "e", "a", "n", "th", "▁th", "the", "▁the", "an", "▁an", "hen", "he"]
MERGES = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "the"), ("th", "e"), ("a", "n"), ("▁", "an"), ("h", "e"), ("he", "n")]


def like_sentencepiece(folder: Path, space_first: bool) -> PreTrainedTokenizerFast:
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {token: number for number, token in enumerate([*special, *PIECES])}
    tokenizer = Tokenizer(models.BPE(vocabulary, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if space_first else replaced
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.add_tokens(["▁▁", "<tool>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = "{{ messages[0].content }}"
    wrapped.save_pretrained(folder)
    return wrapped


def merged_by_score(text: str, keys: dict[str, Any]) -> list[str]:
    """The highest score first, leftmost of equals; characters that are no token become bytes."""
    tokens: list[str] = keys["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, keys["tokenizer.ggml.scores"], strict=True))
    parts = list(("▁" if keys["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", "▁"))
    while True:
        pairs = [(score[a + b], -at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in score]
        if not pairs:
            return [one for part in parts for one in ([part] if part in score else map("<0x{:02X}>".format, part.encode()))]
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@pytest.mark.parametrize("space_first", [True, False])
def test_merging_by_the_scores_in_the_file_gives_the_tokenizer_s_tokens(space_first: bool, tmp_path: Path, run: Run) -> None:
    source = make_model(tmp_path / "model", "gemma", vocab_size=280)
    tokenizer = like_sentencepiece(source, space_first)
    assert run("export", "gguf", source, tmp_path / "m.gguf")[0] == 0
    keys = keys_of(tmp_path / "m.gguf")
    for text in ("the hen", "than then the", "a theé", "hhhe", "anthe an"):
        assert merged_by_score(text, keys) == tokenizer.tokenize(text)
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("llama", "default")
    types = dict(zip(keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"], strict=True))
    assert {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x41>": 6, "the": 1, "  ": 4, "<tool>": 4, "[PAD279]": 5}.items() <= types.items()
    assert keys["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_bytes_and_special_tokens_keep_their_ids(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    assert run("export", "gguf", tiny["llama"], tmp_path / "m.gguf")[0] == 0
    keys = keys_of(tmp_path / "m.gguf")
    vocabulary = json.loads((tiny["llama"] / "tokenizer.json").read_text())["model"]["vocab"]
    assert {token: number for number, token in enumerate(keys["tokenizer.ggml.tokens"])} == vocabulary
    assert (keys["tokenizer.ggml.model"], keys["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert [keys[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")] == [False, False]


def test_a_begin_token_that_the_tokenizer_adds_is_told(tmp_path: Path, run: Run) -> None:
    from tokenizers.processors import TemplateProcessing

    source = make_model(tmp_path / "model", "llama")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer.save(str(source / "tokenizer.json"))
    assert run("export", "gguf", source, tmp_path / "m.gguf")[0] == 0
    keys = keys_of(tmp_path / "m.gguf")
    assert [keys[f"tokenizer.ggml.add_{name}_token"] for name in ("bos", "eos")] == [True, True]


def write(folder: Path, tokenizer: Tokenizer) -> None:
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="a").save_pretrained(folder)


def test_unknown_kinds_are_refused_with_a_way_out(tmp_path: Path, run: Run) -> None:
    source = make_model(tmp_path / "model", "llama")
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    write(source, words)
    code, _, err = run("export", "gguf", source, tmp_path / "m.gguf")
    assert code == 2
    assert "its tokenizer is 'WordLevel', llama.cpp here takes merges (BPE); pass --no-tokenizer" in err
    assert run("export", "gguf", source, tmp_path / "m.gguf", "--no-tokenizer")[0] == 0
    assert keys_of(tmp_path / "m.gguf")["tokenizer.ggml.model"] == "none"


def test_an_unknown_splitting_needs_its_name(tmp_path: Path, run: Run) -> None:
    source = make_model(tmp_path / "model", "llama")
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    write(source, tokenizer)
    code, _, err = run("export", "gguf", source, tmp_path / "m.gguf")
    assert code == 2
    assert "pass llama.cpp's name for it with --pre NAME" in err
    assert run("export", "gguf", source, tmp_path / "m.gguf", "--pre", "falcon")[0] == 0
    assert keys_of(tmp_path / "m.gguf")["tokenizer.ggml.pre"] == "falcon"


def test_a_model_is_named_phi_3_exactly_where_it_has_phi_3_s_tokens() -> None:
    own = ["<unk>", "<s>", "</s>", "<|endoftext|>", "a"]
    assert name_of_model("small", "phi3", own) == "phi-3 small"
    assert name_of_model("Phi-3-small", "phi3", own) == "Phi-3-small"
    assert name_of_model("Phi3-small", "phi3", ["a"]) == "phi 3-small"
    assert name_of_model("small", "llama", own) == "small"


def test_a_model_from_the_hub_is_named_by_its_repository() -> None:
    assert title(Path("hub/models--org--Small-1B/snapshots/0123abcd")) == "Small-1B"
    assert title(Path("out/Small-1B")) == "Small-1B"
