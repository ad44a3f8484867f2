"""walk/images.py: a walk with images computes what the stock model does, and frees the towers. Oracle and property tests."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.errors import UnsupportedArchitecture
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk.calls import Call, Calls
from compresskit.walk.images import Images, check_runs
from compresskit.walk.walk import Walk

WHERE = Where(torch.device("cpu"), torch.float32)
LIKE_QWEN = ("glm4v", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe")
IMAGE = {"gemma3": 122, "llava": 120, "smolvlm": 120, **dict.fromkeys(LIKE_QWEN, 120)}
LENGTH = 40
QWEN_TOKENS = ((2, 4), (4, 2), (2, 2))
"""Sizes of Qwen's images in patches; four of them are a token."""


def qwen_inputs(window: Tensor, number: int, generator: torch.Generator) -> dict[str, Tensor]:
    """An image of another size for each window. Patches of two frames of 14 x 14 pixels of three colours."""
    high, wide = QWEN_TOKENS[number % len(QWEN_TOKENS)]
    window[5 : 5 + high * wide // 4] = IMAGE["qwen3_vl"]
    return {
        "pixel_values": torch.randn(high * wide, 3 * 2 * 14 * 14, generator=generator),
        "image_grid_thw": torch.tensor([[1, high, wide]]),
        "mm_token_type_ids": (window == IMAGE["qwen3_vl"]).long()[None],
    }


def plain_inputs(family: str, window: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """An image of 28 x 28 pixels: one token of SmolVLM, which takes a list of images for each text, and four of the others."""
    window[5 : 6 if family == "smolvlm" else 9] = IMAGE[family]
    shape = (1, 1, 3, 28, 28) if family == "smolvlm" else (1, 3, 28, 28)
    inputs = {"pixel_values": torch.randn(shape, generator=generator)}
    return inputs | ({"token_type_ids": (window == IMAGE[family]).long()[None]} if family == "gemma3" else {})


def windows(family: str, count: int = 4) -> tuple[Tensor, Images]:
    """Windows of which every other one has an image."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 100, (count, LENGTH), generator=generator)
    images = {}
    for number in range(0, count, 2):
        window = tokens[number]
        found = qwen_inputs(window, number, generator) if family in LIKE_QWEN else plain_inputs(family, window, generator)
        images[window.numpy().tobytes()] = found
    return tokens, images


def stock_outputs(network: PreTrainedModel, blocks: list[str], window: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """The inputs of all blocks, then the logits."""
    seen: list[Tensor] = []
    note = lambda module, args, kwargs: seen.append(args[0])  # noqa: E731
    hooks = [network.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in blocks]
    with torch.no_grad():
        logits = network(input_ids=window[None], use_cache=False, **inputs).logits
    for hook in hooks:
        hook.remove()
    return [*seen, logits]


@pytest.mark.parametrize("family", IMAGE)
def test_a_walk_with_images_gives_the_stock_models_hidden_states_and_logits(family: str, tmp_path: Path) -> None:
    folder = families.build(family, tmp_path / family)
    tokens, images = windows(family)
    stock = families.auto_class(family).from_pretrained(folder, dtype=torch.float32).eval()
    model = open_model(folder)
    names = [model.block_name(index) for index in range(model.block_count)]
    expected = [stock_outputs(stock, names, window, images.get(window.numpy().tobytes(), {})) for window in tokens]
    walk = Walk(model, tokens, WHERE, images=images)
    for block in walk:
        for found, wanted in zip(block.hidden, expected, strict=True):
            assert (found - wanted[block.index]).abs().max() < 1e-4, block.name
    for (_, _, logits), wanted in zip(walk.logits(), expected, strict=True):
        assert (logits - wanted[-1]).abs().max() < 1e-4
    blind = stock_outputs(stock, names, tokens[0], {})[-1]
    assert (blind - expected[0][-1]).abs().max() > 1e-2


def test_qwen3_vl_adds_features_of_the_image_between_its_first_blocks(tmp_path: Path) -> None:
    tokens, images = windows("qwen3_vl")
    walk = Walk(open_model(families.build("qwen3_vl", tmp_path / "model")), tokens, WHERE, images=images)
    added = [[call.added is not None for call in block.calls] for block in walk]
    assert added == [[False] * 4, [True, False] * 2, [False] * 4]


@pytest.mark.parametrize("family", ["gemma3", "qwen3_vl"])
def test_the_towers_are_read_for_the_images_and_freed(family: str, tmp_path: Path) -> None:
    tokens, images = windows(family, 2)
    walk = Walk(open_model(families.build(family, tmp_path / family)), tokens, WHERE, images=images)
    for block in walk:
        others = [p for n, p in walk.network.named_parameters(remove_duplicate=False) if not n.startswith(block.name + ".")]
        assert all(parameter.is_meta for parameter in others)


def test_images_are_walked_one_window_at_a_time(tmp_path: Path) -> None:
    model = open_model(families.build("gemma3", tmp_path / "model"))
    tokens, images = windows("gemma3")
    assert [len(batch) for batch in Walk(model, tokens, WHERE, 3, images).batches] == [1, 1, 1, 1]
    assert [len(batch) for batch in Walk(model, tokens, WHERE, 3, {}).batches] == [3, 1]


def test_blocks_that_run_on_images_alone_are_refused(tmp_path: Path) -> None:
    model = open_model(families.build("gemma3", tmp_path / "model"))
    some: list[Calls] = [[Call((), {})] * 4, [Call((), {})] * 2]
    with pytest.raises(UnsupportedArchitecture, match=r"layers\.1 runs on windows with images alone"):
        check_runs(model, some, 4)
    check_runs(model, [some[0], []], 4)
    check_runs(model, some, 0)
