"""walk/kept.py: a run from kept inputs gives the bits of a run in full, and does less. Property tests over families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY
from torch import Tensor, nn

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk import kept
from compresskit.walk.hooks import SeenEnough
from compresskit.walk.sequence import chosen_sequence, collected, replace_weight
from compresskit.walk.statistics import Gram
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")


def edited_walk(folder: Path, keeping: bool) -> tuple[list[Tensor], list[int]]:
    """All second moments and outputs of a walk that rounds each position before it looks at the next; runs of the last linear."""
    model = open_model(folder)
    tokens = torch.randint(3, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
    found: list[Tensor] = []
    runs: list[int] = []
    for block in Walk(model, tokens, Where(CPU, torch.float32), micro_batch=1):
        sequence = chosen_sequence(model, block.index, model.linears)
        first = [block.linear(name) for name in sequence[-2][0]] if len(sequence) > 1 else []
        runs.append(0)

        def count(*_: object) -> None:
            runs[-1] += 1

        handles = [linear.register_forward_hook(count) for linear in first]
        for number, groups in enumerate(sequence):
            grams = collected(groups, block, number >= block.mixer_positions, keeping)
            found += [gram.matrix() for gram in grams.values()]
            for name in (name for group in groups for name in group):
                replace_weight(block.linear(name), block.linear(name).weight.mul(8).round() / 8)
        found += [output for _, output in block.steps()]
        for handle in handles:
            handle.remove()
    return found, runs


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "phi3", "opt", "gpt2", "gpt_neox", "mixtral"])
def test_kept_inputs_change_no_bit(family: str, tiny: dict[str, Path]) -> None:
    expected, all_runs = edited_walk(tiny[family], keeping=False)
    found, fewer_runs = edited_walk(tiny[family], keeping=True)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert all(fewer <= every for fewer, every in zip(fewer_runs, all_runs, strict=True))
    if family in {"llama", "gpt2", "gpt_neox"}:
        assert sum(fewer_runs) < sum(all_runs)


def test_what_has_no_room_runs_in_full(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, all_runs = edited_walk(tiny["llama"], keeping=False)
    _, fewer_runs = edited_walk(tiny["llama"], keeping=True)
    width = open_model(tiny["llama"]).ffn_groups(0)[0].width
    monkeypatch.setattr(kept, "KEPT_BYTES", 2 * 4 * 24 * width)  # two of four micro-batches
    found, some_runs = edited_walk(tiny["llama"], keeping=True)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert sum(fewer_runs) < sum(some_runs) < sum(all_runs)


class Scaled(nn.Module):
    """A module that does more to its last linear's output."""

    def __init__(self, in_place: bool):
        super().__init__()
        self.last, self.in_place = nn.Linear(4, 4), in_place

    def forward(self, x: Tensor) -> Tensor:
        """The output, doubled."""
        output: Tensor = self.last(x)
        return output.mul_(2) if self.in_place else output * 2


@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_a_module_that_goes_on_after_its_last_linear_is_not_replaced(in_place: bool) -> None:
    module = Scaled(in_place)
    tried = kept.Kept(module, module.last)
    with tried.filling():
        with pytest.raises(SeenEnough), tried.watching():
            module(torch.ones(1, 4))
        module(torch.ones(1, 4))
        assert len(tried.inputs) == 1  # no more is kept in vain
    assert not tried.usable and tried.inputs == []


@pytest.mark.parametrize("changed", [False, True])
@torch.no_grad()
def test_inputs_that_lose_features_are_compared_before_they_are_used(changed: bool, tiny: dict[str, Path]) -> None:
    """As pruning does it; with a changed gate the kept inputs are wrong, and are not used."""
    model = open_model(tiny["llama"])
    tokens = torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    plain, keeping = (Walk(model, tokens, Where(CPU, torch.float32), micro_batch=1) for _ in range(2))
    for one, other in zip(plain, keeping, strict=True):
        ffn = model.ffn_groups(one.index)[0].members[0]
        gram = Gram(model.linear_shape(ffn.out_projection)[1])
        other.collect({ffn.out_projection: gram}, attention_is_final=True, only_it_changes=True, comparing=True)
        features = torch.arange(0, model.ffn_groups(one.index)[0].width, 2)
        for block in (one, other):
            for name in ffn.in_projections:
                replace_weight(block.linear(name), block.linear(name).weight[features])
            down = block.linear(ffn.out_projection)
            replace_weight(down, down.weight[:, features] * 1.1)
            if changed:
                block.linear(ffn.in_projections[0]).weight[0] += 1
        assert other.kept
        other.kept.narrow(features)
        runs = list(zip(one.steps(), other.steps(), strict=True))
        assert all(torch.equal(expected, found) for (_, expected), (_, found) in runs)
        assert other.kept.inputs == [] and len(runs) == 3
