"""pruning/depth/choice.py: against the stock network's hidden states, and blocks taken out of it one after another (oracle)."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from compresskit.errors import UnsupportedArchitecture
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.pruning.depth.choice import by_angle, by_loss, by_run, least_turning, least_turning_run
from compresskit.walk.walk import Walk

BLOCKS = 5
numbers = st.lists(st.floats(0, 1), min_size=2, max_size=12)


def anything(_: Collection[int]) -> bool:
    return True


def nothing(*_: object) -> None: ...


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "model", "llama", num_hidden_layers=BLOCKS)


def walk(folder: Path) -> Walk:
    return Walk(open_model(folder), tokens(), Where(torch.device("cpu"), torch.float32), micro_batch=1)


def states(folder: Path) -> list[Tensor]:
    """What each block of the stock network gets, and what the last gives."""
    network = AutoModelForCausalLM.from_pretrained(folder).eval()
    found: list[Tensor] = []
    for block in network.model.layers:
        block.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    network.model.layers[-1].register_forward_hook(lambda _, __, given: found.append(given))
    with torch.no_grad():
        network(input_ids=tokens(), use_cache=False)
    return found


def angle(before: Tensor, after: Tensor) -> float:
    """By complex numbers' own angle: of two unit vectors, 2 atan2(|a - b|, |a + b|)."""
    a, b = (each.double() / each.double().norm(dim=-1, keepdim=True) for each in (before, after))
    return float((2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / torch.pi).mean())


def test_distances_are_angles_between_the_stock_networks_hidden_states(deep: Path) -> None:
    found = states(deep)
    expected = [angle(found[i], found[i + 1]) for i in range(BLOCKS)]
    chosen = by_angle(walk(deep), 2, anything, nothing)
    assert chosen.figures["distances"] == pytest.approx(expected, abs=1e-4)
    assert chosen.removed == sorted(sorted(range(BLOCKS), key=expected.__getitem__)[:2])


@pytest.mark.parametrize("count", [1, 3])
def test_distances_of_runs_are_angles_across_them(count: int, deep: Path) -> None:
    found = states(deep)
    expected = [angle(found[i], found[i + count]) for i in range(BLOCKS - count + 1)]
    chosen = by_run(walk(deep), count, anything, nothing)
    assert chosen.figures["distances"] == pytest.approx(expected, abs=1e-4)
    start = expected.index(min(expected))
    assert chosen.removed == list(range(start, start + count))


def test_blocks_go_one_at_a_time_by_the_divergence_of_the_whole_stock_network(deep: Path) -> None:
    """The stock network again for every candidate, its removed blocks taken out of the list."""
    network = AutoModelForCausalLM.from_pretrained(deep).eval()
    blocks = list(network.model.layers)

    def distribution(removed: Collection[int]) -> Tensor:
        network.model.layers = torch.nn.ModuleList([block for i, block in enumerate(blocks) if i not in removed])
        network.config.num_hidden_layers = BLOCKS - len(removed)
        with torch.no_grad():
            logits: Tensor = network(input_ids=tokens(), use_cache=False).logits.double()
        return logits.softmax(dim=-1)

    original, order, divergences = distribution([]), [], []
    for _ in range(3):
        losses = {}
        for index in set(range(BLOCKS)) - set(order) - {1}:
            found = distribution([*order, index])
            losses[index] = float((original * (original / found).log()).sum(dim=-1).mean())
        order.append(min(losses, key=losses.__getitem__))
        divergences.append(losses[order[-1]])
    chosen = by_loss(walk(deep), 3, lambda removed: 1 not in removed, nothing)
    assert chosen.figures["order"] == order and chosen.removed == sorted(order)
    assert chosen.figures["divergences"] == pytest.approx(divergences, rel=1e-4)


@given(numbers, st.data())
def test_no_allowed_set_of_single_blocks_turns_less(distances: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(distances)))
    stays = data.draw(st.sets(st.integers(0, len(distances) - 1), max_size=len(distances) - count))
    removed = least_turning(distances, count, lambda chosen: not stays & set(chosen))
    free = sorted(value for index, value in enumerate(distances) if index not in stays)
    assert len(removed) == count and not stays & set(removed)
    assert sorted(distances[index] for index in removed) == free[:count]


@given(numbers, st.integers(1, 4))
def test_the_run_is_the_least_one_that_may_go(distances: list[float], count: int) -> None:
    removed = least_turning_run(distances, count, lambda chosen: 0 not in chosen)
    allowed = distances[1:]
    assert removed == list(range(removed[0], removed[0] + count)) and distances[removed[0]] == min(allowed)


def test_a_run_that_may_not_go_is_refused_with_the_remedy(deep: Path) -> None:
    with pytest.raises(UnsupportedArchitecture, match=r"every run of 2 blocks holds all of one kind.*--choose loss"):
        by_run(walk(deep), 2, lambda _: False, nothing)
