"""models/tied_head.py: a tied model that stores the head alone is the model that transformers makes of it. Oracle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from families import build
from recovery_data import stock_logits
from safetensors.torch import load_file
from tiny_models import make_model

from compresskit.checkpoint.reader import sha256
from compresskit.errors import CheckpointError
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options
from compresskit.walk.walk import Walk

TOKENS = torch.arange(3, 27).reshape(2, 12)


def head_alone(source: Path, folder: Path, head: str = "lm_head.weight") -> Path:
    """A copy that stores the embedding under the head's name."""
    shutil.copytree(source, folder)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors[head] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(folder, rename)
    return folder


@pytest.mark.parametrize("family", ["llama", "gemma", "cohere"])
def test_it_is_walked_with_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    """Of the table, tied by its class's default alone, and derived."""
    if family == "cohere":
        source = build(family, tmp_path / "model")
    else:
        source = make_model(tmp_path / "model", family, tie_word_embeddings=True)
    folder = head_alone(source, tmp_path / "head")
    if family == "gemma":
        edit_config(folder, tie_word_embeddings=...)
    model, expected = open_model(folder), stock_logits(source, TOKENS)
    walk = Walk(model, TOKENS, Where(torch.device("cpu"), torch.float32))
    assert sum(1 for _ in walk) == model.block_count
    assert (torch.cat([logits for _, _, logits in walk.logits()]) - expected).abs().max() < 1e-4
    assert torch.equal(stock_logits(folder, TOKENS), expected)
    assert model.checkpoint.stored_as == "the embedding as lm_head.weight"
    assert model.parameters == open_model(source).parameters


def test_its_result_is_that_of_the_usual_files(text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", "llama", tie_word_embeddings=True)
    folder = head_alone(source, tmp_path / "head")
    options = Options(calibration=str(text_file), samples=2, sequence_length=32)
    for each in (source, folder):
        quantize(RTN(group_size=8), str(each), each.with_suffix(".low"), options)
    files = [each.with_suffix(".low") / "model.safetensors" for each in (source, folder)]
    assert sha256(files[0]) == sha256(files[1])
    assert "model.embed_tokens.weight" in load_file(files[1])


def test_an_untied_model_without_an_embedding_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["llama"], tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(CheckpointError, match=r"tensor model\.embed_tokens\.weight is missing"):
        meta.build(open_model(folder))
