"""compensation/output_fisher.py: against autograd's gradient of the drawn tokens at each output. Oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stock_tools import tokens
from torch import Tensor, nn

from compresskit.calibration.sampling import pick
from compresskit.compensation.output_fisher import DAMPING, LEAST, output_weights
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")


def offset(added: list[Tensor]) -> object:
    """A forward hook that adds zeros whose gradient is the one that is asked for."""

    def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        added.append(torch.zeros_like(output, requires_grad=True))
        return output + added[-1]

    return hook


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_weights_are_the_mean_squared_gradients_at_the_outputs(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(tiny[family])
    names = model.linears
    found = output_weights(Walk(model, tokens(), Where(CPU, torch.float32), micro_batch=1), names, tmp_path, lambda *_: None, 3)
    network = Walk(model, tokens(), Where(CPU, torch.float32)).network
    for prefix in ("", *(model.block_name(i) for i in range(model.block_count))):
        meta.fill(model, network, prefix, CPU, torch.float32)
    added: dict[str, list[Tensor]] = {name: [] for name in names}
    for name in names:
        network.get_submodule(name).register_forward_hook(offset(added[name]))
    generator = torch.Generator().manual_seed(3)
    for window in tokens():
        logits = network(window[None]).logits[0]
        drawn = pick(logits.detach(), torch.rand(len(logits), 1, dtype=torch.float64, generator=generator))
        (-logits.log_softmax(dim=-1).gather(1, drawn[:, None])).sum().backward()
    for name in names:
        squares = sum(
            (each.grad.flatten(0, -2).square().sum(dim=0) for each in added[name] if each.grad is not None), torch.zeros(1)
        )
        squares = squares.double() / tokens().numel()
        expected = (squares + DAMPING * squares.mean()).clamp_min(LEAST).expand(model.linear_shape(name)[0])
        assert torch.allclose(found[name], expected, rtol=1e-3, atol=1e-9), name
