"""quantization/apiq/linear.py: where training begins, its gradients, what is stored of it. Oracle: written out by hand."""

from __future__ import annotations

import pytest
import torch
from apiq_parts import storage

from compresskit.formats.peft import configuration
from compresskit.numerics.grid import from_codes, min_max_grid, to_codes
from compresskit.numerics.lowrank import Metric
from compresskit.numerics.packed import QuantizedLinear
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.apiq.linear import TrainedLinear, clipped_grid
from compresskit.quantization.error_feedback import feedback, round_with_feedback


@pytest.mark.parametrize("symmetric", [True, False])
def test_training_begins_exactly_at_the_start(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(6, 16, generator=generator), torch.randn(40, 16, generator=generator)
    scheme = Scheme(2, 8, symmetric)
    grid = min_max_grid(weight, scheme, torch.float16)
    rounded = round_with_feedback(weight, feedback(x.T @ x, 0.01, True), grid, scheme)
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
    scale, zero = (part.repeat_interleave(4, dim=1) for part in grid[:2])
    position = target / scale + zero
    rounded = position.round()
    inside = (rounded >= scheme.lowest) & (rounded <= scheme.highest)
    assert linear.offset.grad is not None and low.grad is not None
    assert torch.allclose(linear.offset.grad, upstream * scale * inside, atol=1e-5)
    steps = rounded.clamp(scheme.lowest, scheme.highest) - zero
    by_scale = (upstream * (steps - inside * target / scale)).unflatten(1, (2, 4)).sum(-1)
    assert torch.allclose(low.grad, -by_scale / scheme.steps, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 8])
def test_what_is_stored_is_what_was_trained(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(6, 16, generator=generator), torch.randn(40, 16, generator=generator)
    linear = TrainedLinear.of(weight, weight, storage(Scheme(2, 8, False), rank=3, bits=bits))
    linear.start_with_adapter(weight, Metric(x.T @ x / len(x)))
    without, full = linear.weights()
    stored = linear.stored()
    assert torch.allclose(stored.weight, full, atol=1e-3)
    assert torch.allclose(from_adapter(stored, bits), full - without, atol=1e-3)
    left, before = (((weight - each) @ x.T).square().sum() for each in (full, without))
    assert left < 0.6 * before


def from_adapter(stored: QuantizedLinear, bits: int) -> torch.Tensor:
    """The update under the configuration that is written beside factors of this many bits."""
    config = configuration("base", {"q_proj": 3}, small=bits == 8)
    first, second = (stored.tensors[f"lora_{each}.weight"].float() for each in "AB")
    return config["lora_alpha"] / config["r"] * second @ first
