"""quantization/apiq/fisher.py: the diagonal is that of autograd over the whole model. Oracle."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from stock_tools import tokens

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.models.model import Model
from compresskit.quantization.apiq.fisher import fisher_diagonals
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_the_fisher_diagonal_is_autograds(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    check_diagonal(open_model(tiny[family]), tokens(), tmp_path)


def test_the_places_of_images_are_not_to_be_predicted(tmp_path: Path) -> None:
    model = open_model(families.build("gemma3", tmp_path / "model"))
    windows = tokens() % 100
    windows[:, 4:9] = image = model.checkpoint.config["image_token_index"]
    check_diagonal(model, windows, tmp_path, image)


def check_diagonal(model: Model, windows: torch.Tensor, tmp_path: Path, ignored: int = -100) -> None:
    names = model.linears
    found = fisher_diagonals(Walk(model, windows, Where(CPU, torch.float32), micro_batch=1), names, tmp_path, lambda *_: None)
    network = Walk(model, windows, Where(CPU, torch.float32)).network
    from compresskit.models import meta

    for prefix in ("", *(model.block_name(i) for i in range(model.block_count))):
        meta.fill(model, network, prefix, CPU, torch.float32)
    sums = {name: torch.zeros(model.linear_shape(name)) for name in names}
    blocks = [model.block_name(index) for index in range(model.block_count)]
    outputs: dict[str, torch.Tensor] = {}
    for block in blocks:
        network.get_submodule(block).register_forward_hook(
            lambda _, __, output, block=block: outputs.update({block: output[0] if isinstance(output, tuple) else output})
        )
        sums[block] = torch.zeros(model.hidden_size)
    for window in windows:
        weights = {name: network.get_submodule(name).weight.requires_grad_(True) for name in names}
        logits = network(window[None]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], window[1:], ignore_index=ignored)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, retain_graph=True)
        for block, gradient in zip(blocks, torch.autograd.grad(loss, [outputs[block] for block in blocks]), strict=True):
            sums[block] += gradient[0].square().mean(dim=0) / len(windows)
        for name, gradient in zip(names, gradients, strict=True):
            sums[name] += 0 if gradient is None else gradient.square() / len(windows)
    for index in range(model.block_count):
        for name, value in found(index).items():
            assert torch.allclose(value, sums[name], rtol=1e-3, atol=1e-9), name
