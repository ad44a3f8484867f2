"""walk/ahead.py: what is fetched ahead changes no result, and no thread goes on after the walk. Property tests."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY

from compresskit.errors import CheckpointError
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.walk import ahead
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="copies on a stream of their own")


def walk(folder: Path, where: Where) -> Walk:
    tokens = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    return Walk(open_model(folder), tokens, where)


def outputs(made: Walk) -> list[torch.Tensor]:
    return [hidden.cpu().clone() for block in made for hidden in block.hidden] + [hidden.cpu() for hidden in made.hidden]


def fetching() -> bool:
    return any(thread.name == "read ahead" for thread in threading.enumerate())


def test_a_walk_that_is_left_early_fetches_nothing_more(tiny: dict[str, Path]) -> None:
    for _ in walk(tiny["llama"], Where(CPU, torch.float32)):
        break
    until = time.monotonic() + 5
    while fetching() and time.monotonic() < until:
        time.sleep(0.01)
    assert not fetching()


def test_weights_that_were_fetched_are_placed_and_not_read_again(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(walk(tiny["llama"], Where(CPU, torch.float32)))
    made = walk(tiny["llama"], Where(CPU, torch.float32))
    placed: list[list[str]] = []

    def take(self: ahead.Ahead) -> dict[str, torch.Tensor]:
        names = meta.wanted(made.model, made.network, made.model.block_name(len(placed)))
        placed.append(names)
        return {name: meta.read_on(made.model, name, CPU, torch.float32) for name in names}

    monkeypatch.setattr(ahead.Ahead, "take", take)
    assert all(map(torch.equal, outputs(made), expected))
    assert len(placed) == made.model.block_count
    assert all(placed)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_an_accelerator_fetched_blocks_give_the_same_bits(
    dtype: torch.dtype, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    where = Where(torch.device("cuda"), dtype)
    fetched = outputs(walk(tiny["llama"], where))
    monkeypatch.setattr(ahead, "STREAMED", ())
    assert all(map(torch.equal, outputs(walk(tiny["llama"], where)), fetched))


@CUDA
def test_what_fails_ahead_is_raised_where_the_block_is_read(tiny: dict[str, Path]) -> None:
    made = walk(tiny["llama"], Where(torch.device("cuda"), torch.float32))
    name = made.model.stored_name(f"{made.model.block_linears(1)[0]}.weight")
    del made.model.checkpoint.file_of[name]
    with pytest.raises((CheckpointError, KeyError)):
        outputs(made)
