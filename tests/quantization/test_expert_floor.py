"""quantization/expert_floor.py: sums against equation 1 in float64; counts, the note and the manifest. Oracle, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Run
from expert_networks import stock
from tiny_models import VOCABULARY, make_model
from torch import Tensor

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.numerics.grid import min_max_grid
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.error_feedback import feedback, round_with_feedback
from compresskit.quantization.expert_floor import ExpertFloor, summary
from compresskit.quantization.gptq import GPTQ
from compresskit.walk.sequence import chosen_sequence, collected
from compresskit.walk.statistics import Gram
from compresskit.walk.walk import Walk

HIDDEN = 32
NEVER, RARELY = (2, 3), (0, 1)
"""Experts that no token reaches, and those that share all."""
FAMILIES = ("qwen2_moe", "mixtral")


def one_sided(folder: Path, family: str) -> Path:
    """A model in which each token goes to expert 0 or 1: the router's rows of the others are shorter along the same line."""
    source = make_model(folder, family, num_experts_per_tok=1)
    network = stock(source)
    for block in network.model.layers:
        if hasattr(block.mlp, "experts"):
            rows = block.mlp.gate.weight.data
            for expert, length in enumerate((1.0, -1.0, 0.5, -0.5)):
                rows[expert] = length * rows[0]
    network.save_pretrained(source)
    return source


def moments(x: Tensor) -> Tensor:
    """Sum of outer products of the rows, float64."""
    return x.double().T @ x.double()


def by_hand(hidden: Tensor, chosen: Tensor, experts: Any, expert: int) -> tuple[Tensor, Tensor, int]:
    """Equation 1 for gate and up, and for the output projection; the expert's tokens."""
    gate, up = experts.get_submodule(f"{expert}.gate_proj").weight, experts.get_submodule(f"{expert}.up_proj").weight
    inner = torch.nn.functional.silu(hidden @ gate.T) * (hidden @ up.T)
    mine = chosen == expert
    found = []
    for x in (hidden, inner):
        weight = min(1.0, max(0, x.shape[1] - int(mine.sum())) / len(x))
        found.append(moments(x[mine]) + weight * moments(x))
    return found[0], found[1], int(mine.sum())


def collect_block(folder: Path, windows: int) -> tuple[ExpertFloor, dict[str, Gram], dict[str, Gram], Tensor, Tensor]:
    """Of the first block: the floor, filled and plain moments of its experts, the experts' inputs and the chosen experts."""
    model = open_model(folder)
    tokens = torch.randint(3, VOCABULARY, (windows, 24), generator=torch.Generator().manual_seed(1))
    block = next(iter(Walk(model, tokens, Where(torch.device("cpu"), torch.float32), micro_batch=1)))
    floor = ExpertFloor(block)
    assert floor.experts is not None
    seen: list[tuple[Tensor, Tensor]] = []
    experts = floor.experts
    handle = experts.register_forward_pre_hook(lambda _, args, kwargs: seen.append(experts.arguments(args, kwargs)[:2]), with_kwargs=True)  # fmt: skip # noqa: E501
    filled: dict[str, Gram] = {}
    plain: dict[str, Gram] = {}
    for number, groups in enumerate(chosen_sequence(model, block.index, model.linears)):
        plain |= collected(groups, block, number >= block.mixer_positions)
        with floor.watching(groups):
            grams = collected(groups, block, number >= block.mixer_positions)
        floor.fill(grams)
        filled |= grams
    handle.remove()
    hidden, chosen = (torch.cat(each) for each in zip(*seen[:windows], strict=True))
    return floor, filled, plain, hidden, chosen[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_filled_up_by_equation_1(family: str, tmp_path: Path) -> None:
    """48 tokens: enough of none for 64 or 96 inputs, and of the 32 inputs of gate and up for at most one expert."""
    floor, filled, _, hidden, chosen = collect_block(one_sided(tmp_path / "source", family), windows=2)
    for expert in range(4):
        gate, down, tokens = by_hand(hidden, chosen, floor.experts, expert)
        assert floor.tokens[expert] == tokens
        for leaf, expected in (("gate_proj", gate), ("down_proj", down)):
            gram = filled[f"{floor.path}.{expert}.{leaf}"]
            assert gram.tokens == max(tokens, min(len(expected), tokens + len(hidden)))
            assert torch.allclose(gram.matrix().double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert [floor.tokens[expert] for expert in NEVER] == [0, 0]
    assert sum(floor.tokens[expert] for expert in RARELY) == len(hidden)
    assert floor.filled == {0, 1, 2, 3}


def test_an_expert_with_enough_tokens_keeps_its_moments(tmp_path: Path) -> None:
    """240 tokens for experts 0 and 1, which have 64 inputs at most."""
    floor, filled, plain, _, _ = collect_block(one_sided(tmp_path / "source", "qwen2_moe"), windows=10)
    assert floor.filled == set(NEVER)
    for name, gram in filled.items():
        if not any(f".experts.{expert}." in name for expert in NEVER):
            assert torch.equal(gram.lower, plain[name].lower)
            assert gram.tokens == plain[name].tokens


def test_an_expert_without_tokens_is_rounded_by_the_moments_of_its_block(tmp_path: Path) -> None:
    floor, filled, _, hidden, _ = collect_block(one_sided(tmp_path / "source", "qwen2_moe"), windows=10)
    weight, scheme = floor.block.linear(f"{floor.path}.2.gate_proj").weight, Scheme(3, 16, True)
    found = GPTQ(bits=3).quantize_group([weight], filled[f"{floor.path}.2.gate_proj"], scheme, torch.float32)[0]
    grid = min_max_grid(weight, scheme, torch.float32)
    rounded = round_with_feedback(weight, feedback(moments(hidden).float() / len(hidden), 0.01, ordered=True), grid, scheme)
    expected = (rounded.codes.view(len(weight), -1, 16) * grid.scale[..., None]).flatten(1)
    nearest = ((weight.view(len(weight), -1, 16) / grid.scale[..., None]).round().clamp(-4, 3) * grid.scale[..., None]).flatten(1)
    assert torch.allclose(found.weight, expected)
    assert not torch.allclose(found.weight, nearest)
    assert found.error is not None and found.error > 0


@pytest.mark.parametrize("method", [("gptq",), ("apiq", "--rank", 0, "--epochs", 1)])
def test_a_run_names_experts_below_the_floor(method: tuple[object, ...], run: Run, text_file: Path, tmp_path: Path) -> None:
    source = one_sided(tmp_path / "source", "qwen2_moe")
    name, *flags = method
    code, text, err = run("quantize", name, source, tmp_path / "out", *flags, "--calibration", text_file, *SMALL, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result["expert_tokens"]["fewest"] == 0
    assert result["filled_experts"] >= 4
    assert "block 0 expert 2 (0)" in err and "pass more --samples" in err
    blocks = json.loads((tmp_path / "out" / "compresskit.json").read_text())["facts"]["blocks"]
    assert [bool(block.get("tokens_by_expert")) for block in blocks] == [True, False, True]
    assert sum(blocks[0]["tokens_by_expert"]) == 8 * 64
    assert set(NEVER) <= set(blocks[0]["filled_experts"])
    stock(tmp_path / "out")


def test_a_summary_counts_and_names_a_few() -> None:
    many = {"tokens_by_expert": list(range(20)), "filled_experts": list(range(10))}
    found = summary([{}, many])
    assert found["expert_tokens"] == {"fewest": 0, "median": 10, "most": 19}
    assert found["filled_experts"] == 10
    assert "block 1 expert 7 (7) and 2 more;" in found["notes"][0]
    assert "notes" not in summary([many | {"filled_experts": []}])
    assert summary([{}, {"relative_output_errors": {}}]) == {}
