"""searching/scoring.py: against autograd's gradients at the outputs, token by token, and the method's own rounding. Oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import tokens
from torch import Tensor, nn

from compresskit.calibration.sampling import pick
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.quantization.formatted import FormatMethod
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.rtn import RTN
from compresskit.searching.candidates import candidates
from compresskit.searching.scoring import SEED, codes_file, score
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")
NAMES = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")


def seen(walk: Walk) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and gradients of the outputs of `NAMES` at every token, by plain autograd through the whole network."""
    network = walk.network
    for prefix in ("", *(walk.model.block_name(i) for i in range(walk.model.block_count))):
        meta.fill(walk.model, network, prefix, CPU, torch.float32)
    inputs: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    added: dict[str, list[Tensor]] = {name: [] for name in NAMES}

    def watch(name: str) -> None:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name].append(given[0].detach().flatten(0, -2))
            added[name].append(torch.zeros_like(output, requires_grad=True))
            return output + added[name][-1]

        network.get_submodule(name).register_forward_hook(hook)

    for name in NAMES:
        watch(name)
    generator = torch.Generator().manual_seed(SEED)
    for window in tokens():
        logits = network(window[None]).logits[0]
        drawn = pick(logits.detach(), torch.rand(len(logits), 1, dtype=torch.float64, generator=generator))
        (-logits.log_softmax(dim=-1).gather(1, drawn[:, None])).sum().backward()
    gradients = {name: torch.cat([each.grad.flatten(0, -2) for each in added[name] if each.grad is not None]) for name in NAMES}
    return {name: (torch.cat(inputs[name]), gradients[name]) for name in NAMES}


@pytest.mark.parametrize("method", [RTN(symmetric=True, clipping="error"), GPTQ(symmetric=True)], ids=["rtn", "gptq"])
def test_a_cost_is_half_the_weighted_squares_of_the_output_errors(
    method: FormatMethod, tiny: dict[str, Path], tmp_path: Path
) -> None:
    model = open_model(tiny["llama"])
    units = [unit for unit in candidates(model, model.linears, (2, 4), (8, 16), "F16") if set(unit.linears) & set(NAMES)]
    walk = Walk(model, tokens(), Where(CPU, torch.float32), micro_batch=1)
    (tmp_path / "scratch").mkdir()
    costs = score(walk, units, method, torch.float16, (tmp_path / "scratch", tmp_path), lambda *_: None)
    exact = seen(Walk(model, tokens(), Where(CPU, torch.float32)))
    for unit, found in zip(units, costs, strict=True):
        stored = load_file(codes_file(tmp_path, unit.block))
        name = next(name for name in unit.linears if name in NAMES)
        inputs, gradients = exact[name]
        weight = meta.read_plain(model, f"{name}.weight").float()
        for option, scheme in enumerate(unit.schemes):
            codes, scale = stored[f"{name}|{option}.codes"].float(), stored[f"{name}|{option}.scale"].float()
            rounded = (codes.view(*scale.shape, -1) * scale[..., None]).flatten(1)
            error = inputs.double() @ (rounded - weight).double().T
            alone = float((gradients.double() * error).square().sum(dim=1).mean()) / 2
            if len(unit.linears) == 1:
                assert found[option] == pytest.approx(alone, rel=1e-3)
            else:
                assert found[option] > alone > 0  # q and v add theirs
            if isinstance(method, RTN):  # what `quantize` stores
                own = method.quantize_group([weight], None, scheme, torch.float16)[0].weight
                assert torch.allclose(own, rounded, rtol=2e-3)  # float16 products
