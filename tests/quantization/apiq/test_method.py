"""ApiQ: its equations, that training helps and never harms, the adapter that stock peft loads. Oracle, property, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import stock_logits, tokens, walked_logits
from tiny_models import FAMILIES, make_model

from compresskit.errors import RequestError
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.machine.device import Where
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.load import open_model
from compresskit.numerics.grid import from_codes, min_max_grid, to_codes
from compresskit.numerics.lowrank import Metric
from compresskit.numerics.packed import Storage, StoredLinear
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.apiq.fisher import fisher_diagonals
from compresskit.quantization.apiq.linear import TrainedLinear, clipped_grid
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.apiq.trainer import Trainer
from compresskit.quantization.error_feedback import round_with_feedback
from compresskit.quantization.run import quantize
from compresskit.stages import Options
from compresskit.walk.sequence import chosen_sequence
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")
PACKED = tuple(family for family in FAMILIES if not ARCHITECTURES[family].transposed)


def options(text: Path) -> Options:
    return Options(calibration=str(text), samples=8, sequence_length=64)


def storage(scheme: Scheme, scale_dtype: torch.dtype = torch.float16, rank: int = 0, bits: int = 16) -> Storage:
    return Storage(scheme, scale_dtype, rank, torch.float16 if bits == 16 else torch.float8_e4m3fn, {})


@pytest.mark.parametrize("symmetric", [True, False])
def test_training_begins_exactly_at_the_start(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 16, generator=generator), torch.randn(40, 16, generator=generator)
    scheme = Scheme(2, 8, symmetric)
    grid = min_max_grid(weight, scheme, torch.float16)
    rounded = round_with_feedback(weight, x.T @ x, grid, scheme, 0.01, True)
    for target, codes in ((weight, to_codes(weight, grid, scheme)), (rounded.targets, rounded.codes)):
        found, _ = TrainedLinear.of(weight, target, storage(scheme)).weights()
        assert torch.allclose(found, from_codes(codes, grid, scheme), atol=1e-6)


def test_gradients_are_those_of_the_straight_through_estimator() -> None:
    """By hand: dW/dV = s inside the range and 0 outside; dW/ds = Q - z - inside * T / s."""
    generator = torch.Generator().manual_seed(1)
    target, scheme = 2 * torch.randn(3, 8, generator=generator), Scheme(2, 4, False)
    linear = TrainedLinear.of(target / 2, target, storage(scheme, torch.float32))
    low, high = linear.low.clone().requires_grad_(True), linear.high.clone().requires_grad_(True)
    linear.low, linear.high = low, high
    linear.offset.requires_grad_(True)
    weight, _ = linear.weights()
    upstream = torch.randn(3, 8, generator=generator)
    weight.backward(upstream)
    grid = clipped_grid(low.detach(), high.detach(), scheme, torch.float32)
    scale, zero = (part.repeat_interleave(4, dim=1) for part in grid)
    position = target / scale + zero
    rounded = position.round()
    inside = (rounded >= scheme.lowest) & (rounded <= scheme.highest)
    assert linear.offset.grad is not None and low.grad is not None
    assert torch.allclose(linear.offset.grad, upstream * scale * inside, atol=1e-5)
    steps = rounded.clamp(scheme.lowest, scheme.highest) - zero
    by_scale = (upstream * (steps - inside * target / scale)).unflatten(1, (2, 4)).sum(-1)
    assert torch.allclose(low.grad, -by_scale / scheme.steps, atol=1e-4)


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


@pytest.mark.parametrize("bits", [2, 3])
def test_the_loss_falls_in_every_block_and_the_result_beats_its_start(
    bits: int, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    kls = {}
    for epochs in (0, 12):
        out = tmp_path / str(epochs)
        quantize(ApiQ(bits=bits, group_size=16, rank=0, epochs=epochs), str(tiny["llama"]), out, options(text_file))
        report = evaluate(
            str(out), EvaluateOptions(against=str(tiny["llama"]), data=str(text_file), windows=8, sequence_length=64)
        )
        kls[epochs] = report["kl"]
    facts = json.loads((tmp_path / "12" / "compresskit.json").read_text())["facts"]["blocks"]
    assert all(block["trained_error"] < block["start_error"] for block in facts)
    assert bits > 2 or kls[12] < kls[0]  # at 3 bits a random model's KL is all noise


def test_a_training_that_harms_is_undone(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    wild = ApiQ(bits=3, group_size=16, rank=4, epochs=2, batch=8, clipping_rate=100.0, learning_rate=10.0)
    still = wild.model_copy(update={"epochs": 0})
    for name, method in (("wild", wild), ("still", still)):
        quantize(method, str(tiny["llama"]), tmp_path / name, options(text_file))
    facts = json.loads((tmp_path / "wild" / "compresskit.json").read_text())["facts"]["blocks"]
    assert all(block["trained_error"] > block["start_error"] for block in facts)
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "wild" / file).read_bytes() == (tmp_path / "still" / file).read_bytes()


def test_every_familys_result_and_adapter_load_with_stock_tools(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    for family in PACKED:
        experts = bool(ARCHITECTURES[family].experts)
        method = ApiQ(bits=2, group_size=16, epochs=1, rank=0 if experts else 3, symmetric=experts)
        quantize(method, str(tiny[family]), tmp_path / family, options(text_file))
    folders = [tmp_path / family for family in PACKED]
    for folder, found in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert (found - walked_logits(folder)).abs().max() < 1e-3, folder.name


def test_the_adapter_finds_its_base_from_another_folder(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(ApiQ(bits=2, group_size=16, epochs=0, rank=2), str(tiny["llama"]), Path("out"), options(text_file))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "out").resolve())


def test_the_adapter_counts_as_stored_bits(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    method = ApiQ(bits=2, group_size=16, epochs=0, rank=4)
    result = quantize(method, str(tiny["llama"]), tmp_path / "out", options(text_file))
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    dense = load_file(tiny["llama"] / "model.safetensors")
    packed = load_file(tmp_path / "out" / "model.safetensors")
    stored = [t for name, t in packed.items() if name not in dense] + list(adapter.values())
    weights = sum(t.numel() for name, t in dense.items() if name not in packed)
    assert abs(8 * sum(t.numel() * t.element_size() for t in stored) / weights - result["bits_per_weight"]) < 1e-9
    without = evaluate(str(tmp_path / "out"), EvaluateOptions(data=str(text_file), windows=2, sequence_length=64, adapter="none"))
    with_it = evaluate(str(tmp_path / "out"), EvaluateOptions(data=str(text_file), windows=2, sequence_length=64))
    assert without["perplexity"] != with_it["perplexity"]
    assert with_it["bytes"] - without["bytes"] == (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size


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


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_stored_is_what_was_trained(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 16, generator=generator), torch.randn(40, 16, generator=generator)
    linear = TrainedLinear.of(weight, weight, storage(Scheme(2, 8, False), rank=3, bits=bits))
    linear.start_with_adapter(weight, Metric(x.T @ x / len(x)))
    without, full = linear.weights()
    stored = linear.stored()
    assert torch.allclose(stored.weight, full, atol=1e-3)
    assert torch.allclose(from_adapter(stored), full - without, atol=1e-3)
    left, before = (((weight - each) @ x.T).square().sum() for each in (full, without))
    assert left < 0.6 * before


def from_adapter(stored: StoredLinear) -> torch.Tensor:
    first, second = (stored.tensors[f"lora_{each}.weight"].float() for each in "AB")
    return stored.adapter_scale * second @ first


def test_an_adapter_in_eight_bits_takes_half_the_bytes_and_loads_with_stock_tools(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    for bits in (16, 8):
        method = ApiQ(bits=2, group_size=16, epochs=2, rank=4, adapter_bits=bits)
        quantize(method, str(tiny["llama"]), tmp_path / str(bits), options(text_file))
    large, small = (load_file(tmp_path / str(bits) / "adapter" / "adapter_model.safetensors") for bits in (16, 8))
    assert {tensor.dtype for tensor in small.values()} == {torch.float8_e4m3fn}
    assert 2 * sum(t.nbytes for t in small.values()) == sum(t.nbytes for t in large.values())
    (found,) = stock_logits([tmp_path / "8"], tmp_path)
    assert (found - walked_logits(tmp_path / "8")).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_the_fisher_diagonal_is_autograds(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(tiny[family])
    names = model.linears
    found = fisher_diagonals(Walk(model, tokens(), Where(CPU, torch.float32), micro_batch=1), names, tmp_path, lambda *_: None)
    network = Walk(model, tokens(), Where(CPU, torch.float32)).network
    from compresskit.models import meta

    for prefix in ("", *(model.block_name(i) for i in range(model.block_count))):
        meta.fill(model, network, prefix, CPU, torch.float32)
    sums = {name: torch.zeros(model.linear_shape(name)) for name in names}
    for window in tokens():
        weights = {name: network.get_submodule(name).weight.requires_grad_(True) for name in names}
        logits = network(window[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:])
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += 0 if gradient is None else gradient.square() / len(tokens())
    for index in range(model.block_count):
        for name, value in found(index).items():
            assert torch.allclose(value, sums[name], rtol=1e-3, atol=1e-9), name


@pytest.mark.parametrize("saliency", ["fisher", "none"])
@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_every_variant_runs_and_is_reproducible(
    saliency: str, start: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    settings = {"saliency": saliency, "start": start, "regularize": "after-lora", "rounding": "nearest"}
    method = ApiQ(bits=3, rank=2, epochs=2, batch=4, **settings)  # type: ignore[arg-type]
    for name in ("a", "b"):
        quantize(method, str(tiny["qwen3"]), tmp_path / name, options(text_file))
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not list(tmp_path.glob(".*scratch*"))


def test_a_rank_above_the_smallest_side_is_refused(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--rank 40"):
        quantize(ApiQ(bits=3, rank=40), str(tiny["llama"]), tmp_path / "out", options(text_file))
