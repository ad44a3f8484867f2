"""models/scalings.py: the recorded factors by linear, through a chain of manifests. Oracle tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_model

from compresskit.errors import CheckpointError, RequestError
from compresskit.models.load import open_model
from compresskit.models.scalings import recorded, scaled_links, scalings

VALUES, OUTPUT = (f"model.layers.1.self_attn.{name}_proj" for name in "vo")
FACTORS = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.5
"""Of the values' outputs: two heads of 8, each read by two heads of queries."""


def link(stage: str, source: Any, **more: Any) -> dict[str, Any]:
    return {"stage": stage, "method": "x", "settings": {}, "facts": {}, "outputs": {"sha256": {}}, "source": source, **more}


def scaled(source: Any, **more: Any) -> dict[str, Any]:
    fact = {"into": "self_attn.v_proj", "exponent": 0.5, "error": 0.9} | recorded(["self_attn.o_proj"], (2, 8), FACTORS) | more
    blocks = [{"scaling": {"self_attn.q_proj": {"into": None}}}, {"scaling": {"self_attn.o_proj": fact}}, {"scaling": {}}]
    return link("quantize", source, settings={"scaling": "awq"}, facts={"blocks": blocks})


def opened(folder: Path, manifest: dict[str, Any]) -> Any:
    (folder / "compresskit.json").write_text(json.dumps({"format_version": 1, **manifest}))
    return open_model(folder)


def test_factors_are_of_rows_and_of_the_shared_heads_columns(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = opened(make_model(tmp_path / "model", "llama"), link("recover", scaled(None)))
    found = scalings(model, open_model(tiny["llama"]))
    assert set(found.rows) == {VALUES} and set(found.columns) == {OUTPUT}
    generator = torch.Generator().manual_seed(1)
    values, weight, inputs = (torch.randn(*shape, generator=generator) for shape in ((16, 32), (32, 32), (32,)))
    made = values @ inputs
    joined = torch.cat([made[:8], made[:8], made[8:], made[8:]])
    again = found.scaled(VALUES, values) @ inputs
    assert torch.allclose(again * FACTORS, made, rtol=1e-4)
    assert torch.allclose(found.of_outputs(VALUES, values), found.scaled(VALUES, values))
    spread = torch.cat([again[:8], again[:8], again[8:], again[8:]])
    assert torch.allclose(found.scaled(OUTPUT, weight) @ spread, weight @ joined, atol=1e-4)
    assert found.of_outputs(OUTPUT, weight) is weight


def test_only_what_is_newer_than_the_original_counts_and_two_scalings_multiply(tmp_path: Path) -> None:
    original = open_model(make_model(tmp_path / "original", "llama", seed=1))
    older = scaled(None) | {"outputs": {"sha256": original.checkpoint.hashes}}
    model = opened(make_model(tmp_path / "model", "llama"), scaled(older))
    assert torch.equal(scalings(model, original).rows[VALUES], FACTORS)
    other = open_model(make_model(tmp_path / "other", "llama", seed=2))
    assert torch.allclose(scalings(model, other).rows[VALUES], FACTORS.square())


def test_a_model_that_was_pruned_after_it_was_scaled_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = opened(make_model(tmp_path / "model", "llama"), link("prune", scaled(None)))
    with pytest.raises(RequestError, match=r"was scaled by --scaling, then pruned; pass the model that was pruned"):
        scaled_links(model, open_model(tiny["llama"]))
    assert not scalings(opened(tmp_path / "model", link("quantize", None)), open_model(tiny["llama"])).rows


@pytest.mark.parametrize(
    "damage", [{"factors": "AAAA"}, {"factors": "?"}, {"shared": [1, 1]}, {"readers": ["nothing"]}, {"factors": "AADAfw=="}]
)
def test_factors_that_do_not_fit_are_told(damage: dict[str, Any], tiny: dict[str, Path], tmp_path: Path) -> None:
    model = opened(make_model(tmp_path / "model", "llama"), scaled(None, **damage))
    with pytest.raises(CheckpointError, match="says not by which factors the weights were scaled"):
        scalings(model, open_model(tiny["llama"]))
