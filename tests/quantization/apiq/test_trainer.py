"""quantization/apiq/trainer.py: its error by hand (oracle), harm is undone, norms in their dtype (end to end)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from apiq_parts import storage
from safetensors.torch import load_file
from small_runs import options
from stock_tools import tokens
from tiny_models import make_model

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.apiq.trainer import Trainer
from compresskit.quantization.run import quantize
from compresskit.walk.sequence import chosen_sequence
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")


def test_the_error_of_a_massive_token_is_divided_by_its_own_energy(tiny: dict[str, Path]) -> None:
    """By hand: e_t / max(energy of t, median energy); the relative and the absolute error beside it."""
    generator = torch.Generator().manual_seed(2)
    target = torch.randn(1, 5, 16, generator=generator)
    target[0, 3] *= 100
    output = target + 0.1 * torch.randn(1, 5, 16, generator=generator)
    block = next(iter(Walk(open_model(tiny["llama"]), tokens(), Where(CPU, torch.float32))))
    squares, energies = (output - target).square().mean(-1)[0], target.square().mean(-1)[0]
    usual = energies.median()
    expected = {"absolute": squares, "relative": squares / energies, "capped": squares / torch.maximum(energies, usual)}
    for error, values in expected.items():
        trainer = Trainer(ApiQ(error=error), block, [target], storage(Scheme(2, 16, False)), {})  # type: ignore[arg-type]
        assert torch.allclose(trainer.micro_batch_error(output, 0), values.mean(), rtol=1e-5)


def test_channels_count_as_much_as_the_loss_depends_on_them(tiny: dict[str, Path]) -> None:
    """By hand: the squares of error and state are weighted by the diagonal over its mean, at any unit of the loss."""
    generator = torch.Generator().manual_seed(2)
    target, error = torch.randn(2, 1, 5, 16, generator=generator)
    block = next(iter(Walk(open_model(tiny["llama"]), tokens(), Where(CPU, torch.float32))))
    fisher = torch.rand(16, generator=generator)
    weights = fisher / fisher.mean()
    energies = (weights * target.square()).mean(-1)
    expected = (weights * error.square()).mean(-1) / torch.maximum(energies, energies.median())
    for unit in (1.0, 1e-9):
        trainer = Trainer(ApiQ(), block, [target], storage(Scheme(2, 16, False)), {block.name: unit * fisher})
        assert torch.allclose(trainer.micro_batch_error(target + error, 0), expected.mean(), rtol=1e-5)
    for method, found in ((ApiQ(output_weights="none"), fisher), (ApiQ(), 0 * fisher)):
        plain = Trainer(method, block, [target], storage(Scheme(2, 16, False)), {block.name: found})
        energies = target.square().mean(-1)
        by_hand = (error.square().mean(-1) / torch.maximum(energies, energies.median())).mean()
        assert torch.allclose(plain.micro_batch_error(target + error, 0), by_hand, rtol=1e-5)


def test_a_training_that_harms_is_undone(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    wild = ApiQ(bits=3, group_size=16, rank=4, epochs=2, batch=8, clipping_rate=100.0, learning_rate=10.0)
    still = wild.model_copy(update={"epochs": 0})
    for name, method in (("wild", wild), ("still", still)):
        quantize(method, str(tiny["llama"]), tmp_path / name, options(text_file))
    facts = json.loads((tmp_path / "wild" / "compresskit.json").read_text())["facts"]["blocks"]
    assert all(block["trained_error"] > block["start_error"] for block in facts)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "wild" / file).read_bytes() == (tmp_path / "still" / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "opt", "gemma2", "qwen2"])
def test_norms_and_biases_are_trained_in_their_stored_dtype_or_kept(family: str, text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", family, dtype=torch.bfloat16)
    dense = load_file(source / "model.safetensors")
    for rate in (0.0, 1.0):
        method = ApiQ(bits=2, group_size=16, rank=0, epochs=12, norm_rate=rate)
        quantize(method, str(source), tmp_path / str(rate), options(text_file))
        found = load_file(tmp_path / str(rate) / "model.safetensors")
        vectors = {n: t for n, t in found.items() if t.ndim == 1 and "layers." in n and not n.endswith("_shape")}
        assert vectors
        assert {t.dtype for t in vectors.values()} == {torch.bfloat16}
        changed = {n for n, t in vectors.items() if not torch.equal(t, dense[n])}
        assert bool(changed) == bool(rate)


def test_each_value_of_a_norm_moves_in_units_of_its_own_size(tiny: dict[str, Path]) -> None:
    """Gemma 3 has norms with values of 0.6 beside 600: one distance for all would change the small ones a thousandfold."""
    block = next(iter(Walk(open_model(tiny["llama"]), tokens(), Where(CPU, torch.float32))))
    targets = list(block.run_all(block.hidden))
    name = next(name for name, each in block.module.named_parameters() if each.ndim == 1)
    with torch.no_grad():
        block.module.get_parameter(name).copy_(torch.logspace(-4, 1, len(block.module.get_parameter(name))))
        block.module.get_parameter(name)[3] = 0
    start = block.module.get_parameter(name).detach().clone()
    storage_of = storage(Scheme(2, 16, False))._replace(vectors={name: torch.float32})
    trainer = Trainer(ApiQ(bits=2, rank=0, epochs=4, norm_rate=0.1), block, targets, storage_of, {})
    trainer.start(chosen_sequence(open_model(tiny["llama"]), 0, open_model(tiny["llama"]).linears))
    trainer.train(trainer.block_error())
    moved = (trainer.vectors[name] - start).abs()
    assert bool((moved <= 0.25 * start).all())
    assert int((moved > 0.001 * start).sum()) > len(start) / 2
    assert float(moved[3]) == 0


def test_norms_are_trained_in_float32_where_the_block_computes_in_bfloat16(tiny: dict[str, Path]) -> None:
    """A step of a norm is often below bfloat16's resolution: summed in it, the steps would be lost."""
    blocks = [next(iter(Walk(open_model(tiny["llama"]), tokens(), Where(CPU, torch.bfloat16)))) for _ in range(2)]
    targets = [output for _, output in blocks[0].steps()]
    names = {name: torch.bfloat16 for name, each in blocks[1].module.named_parameters() if each.ndim == 1}
    storage_of = storage(Scheme(2, 16, False))._replace(vectors=names)
    trainer = Trainer(ApiQ(bits=2, rank=0, epochs=2), blocks[1], targets, storage_of, {})
    trainer.start(chosen_sequence(open_model(tiny["llama"]), 0, open_model(tiny["llama"]).linears))
    trainer.train(trainer.block_error())
    assert names
    for name, vector in trainer.vectors.items():
        assert vector.dtype == torch.float32
        assert not torch.equal(vector, vector.bfloat16().float())
        assert not torch.equal(vector, trainer.start_vectors[name])
