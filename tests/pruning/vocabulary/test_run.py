"""pruning/vocabulary/run.py: the result in stock transformers: the same tokens, the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import make_adapter, make_model
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit import prune, quantize
from compresskit.errors import CheckpointError, CompresskitError, RequestError, UnsupportedArchitecture
from compresskit.models.prunings import kept_channels
from tests.trained_tokenizers import TEXT, made, write

KEPT = TEXT[:2]
"""Lines whose tokens stay."""


def model_with(folder: Path, kind: str, family: str = "llama", **changes: object) -> Path:
    size = Tokenizer.from_str(made(kind)).get_vocab_size() + 5  # rows that no token has
    make_model(folder, family, vocab_size=size, **changes)
    write(folder, kind)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(KEPT), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("kind", "family", "changes"),
    [
        ("byte-level", "llama", {"tie_word_embeddings": True}),
        ("byte-level", "phi", {"tie_word_embeddings": False}),  # its head has a bias
        ("BPE", "gemma", {}),
        ("Unigram", "smollm3", {"tie_word_embeddings": False}),
    ],
)
def test_kept_tokens_have_the_same_logits(kind: str, family: str, changes: dict[str, object], text: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", kind, family, **changes)
    result = prune(source, tmp_path / "out", "vocabulary", keep_from=(str(text),), round_to=8, quiet=True)
    assert result["tokens_after"] < result["tokens_before"]
    assert result["lines_cut_otherwise"] == 0
    assert result["text_tokens_kept"] == 1
    kept = kept_tokens(tmp_path / "out")
    assert len(kept) == result["tokens_after"]
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (source, tmp_path / "out"))
    cutters = [AutoTokenizer.from_pretrained(folder) for folder in (source, tmp_path / "out")]
    number = {before: after for after, before in enumerate(kept)}
    for line in KEPT:
        before, after = (cutter(line).input_ids for cutter in cutters)
        assert [number[token] for token in before] == after
        with torch.no_grad():
            expected = old(torch.tensor([before])).logits[..., kept]
            torch.testing.assert_close(new(torch.tensor([after])).logits, expected, rtol=1e-5, atol=1e-5)
    assert new.config.eos_token_id == number[old.config.eos_token_id]
    assert new.generation_config.eos_token_id == number[2]
    assert cutters[1].decode(cutters[1](TEXT[3], add_special_tokens=False).input_ids) == TEXT[3]


def kept_tokens(folder: Path) -> list[int]:
    """What the manifest says."""
    return kept_channels(json.loads((folder / "compresskit.json").read_text())["facts"]["kept_tokens"])


def test_a_share_goes_and_other_files_of_the_tokenizer_with_it(text: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", "byte-level")
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("")
    (source / "chat_template.jinja").write_text("{% for m in messages %}quick brown fox{{ m.content }}{% endfor %}")
    result = prune(source, tmp_path / "out", "vocabulary", keep_from=(str(text),), sparsity=0.2, round_to=4, quiet=True)
    assert result["tokens_after"] == round(0.8 * 421) // 4 * 4
    assert not (tmp_path / "out/vocab.json").exists()
    assert not (tmp_path / "out/merges.txt").exists()
    number = {before: after for after, before in enumerate(kept_tokens(tmp_path / "out"))}
    old = Tokenizer.from_str(made("byte-level")).encode("quick brown fox", add_special_tokens=False).ids
    assert set(old) <= set(number)
    with pytest.raises(RequestError, match="must stay"):
        prune(source, tmp_path / "less", "vocabulary", keep_from=(str(text),), sparsity=0.9, quiet=True)
    assert not (tmp_path / "less").exists()


def test_rare_tokens_that_go_are_counted(text: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", "byte-level")
    result = prune(source, tmp_path / "out", "vocabulary", keep_from=(str(text),), sparsity=0.36, round_to=1, quiet=True)
    assert 0 < result["text_tokens_kept"] < 1
    assert result["lines_cut_otherwise"] > 0
    cutter = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [cutter.decode(cutter(line, add_special_tokens=False).input_ids) for line in TEXT] == TEXT


def test_scripts_alone(tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", "byte-level")
    prune(source, tmp_path / "out", "vocabulary", keep_scripts=("latin",), round_to=1, quiet=True)
    lengths = [
        [len(AutoTokenizer.from_pretrained(folder)(line).input_ids) for line in TEXT] for folder in (source, tmp_path / "out")
    ]
    assert lengths[0][:3] == lengths[1][:3]
    assert lengths[0][3] < lengths[1][3]


def test_a_low_bit_model_keeps_its_codes(text: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", "byte-level")
    quantize(
        source, tmp_path / "low", "rtn", bits=4, group_size=8, calibration=str(text), samples=1, sequence_length=8, quiet=True
    )
    result = prune(tmp_path / "low", tmp_path / "out", "vocabulary", keep_from=(str(text),), quiet=True)
    assert result["bytes_after"] < result["bytes_before"]
    old, new = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("low", "out"))
    kept = kept_tokens(tmp_path / "out")
    ids = torch.arange(len(kept))[None, :20]
    with torch.no_grad():
        torch.testing.assert_close(new(ids).logits, old(torch.tensor(kept)[ids]).logits[..., kept], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({}, RequestError, "nothing says which tokens"),
        ({"keep_from": ("self",)}, RequestError, "own samples need every token"),
        ({"keep_from": ("nowhere.txt",)}, CompresskitError, "no such file"),
        ({"keep_from": ("nowhere",)}, CompresskitError, "--keep-from 'nowhere': unknown kind of text"),
        ({"keep_scripts": ("klingon",)}, RequestError, "begins no letter"),
        ({"keep_scripts": ("latin",), "max_shard_size": "x"}, RequestError, "not a size"),
    ],
)
def test_bad_requests_are_refused(settings: dict[str, object], kind: type[CompresskitError], said: str, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", "byte-level")
    with pytest.raises(kind, match=said):
        prune(source, tmp_path / "out", "vocabulary", quiet=True, **settings)
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_be_cut_are_refused(text: Path, tmp_path: Path) -> None:
    source = model_with(tmp_path / "model", "byte-level")

    def refused(kind: type[CompresskitError], said: str) -> None:
        with pytest.raises(kind, match=said):
            prune(source, tmp_path / "out", "vocabulary", keep_from=(str(text),), quiet=True)
        assert not (tmp_path / "out").exists()

    (source / "tekken.json").write_text("{}")
    refused(UnsupportedArchitecture, "a tokenizer of its own")
    (source / "tekken.json").unlink()
    make_adapter(source / "adapter", source)
    refused(RequestError, "has an adapter beside its weights")
    for file in (source / "adapter").iterdir():
        file.unlink()
    (source / "adapter").rmdir()
    content = json.loads(made("byte-level"))
    content["added_tokens"].append({**content["added_tokens"][0], "id": 5000, "content": "<beyond>"})
    (source / "tokenizer.json").write_text(json.dumps(content))
    refused(CheckpointError, "token 5000 is beyond")
