"""quantization/mixed.py: the budget holds, the choice is best on small cases, losses are those of whole models. Oracle."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.mixed import _rounded_outputs, allocate_bits, block_losses
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.rtn import RTN
from compresskit.stages import Options
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")
convex = st.lists(
    st.tuples(st.floats(0.1, 9), st.floats(0.01, 0.9)).map(lambda pair: {2: pair[0], 3: pair[0] * pair[1]}),
    min_size=1,
    max_size=6,
)


@given(convex, st.floats(2, 3))
def test_with_two_levels_and_equal_blocks_the_choice_is_the_best_there_is(losses: list[dict[int, float]], average: float) -> None:
    found = allocate_bits(losses, [5] * len(losses), average)
    assert sum(found) <= average * len(losses) + 1e-6
    best = min(
        sum(loss[bits] for loss, bits in zip(losses, choice, strict=True))
        for choice in itertools.product((2, 3), repeat=len(losses))
        if sum(choice) <= average * len(losses) + 1e-9
    )
    assert sum(loss[bits] for loss, bits in zip(losses, found, strict=True)) <= best + 1e-9


@given(st.lists(st.integers(1, 50), min_size=2, max_size=6), st.floats(2, 4))
def test_the_weighted_average_stays_within_the_budget(sizes: list[int], average: float) -> None:
    losses = [{2: float(size), 3: size / 3, 4: size / 9} for size in sizes]
    found = allocate_bits(losses, sizes, average)
    assert sum(b * n for b, n in zip(found, sizes, strict=True)) <= average * sum(sizes) + 1e-6


def test_bits_that_gain_nothing_are_not_spent() -> None:
    assert allocate_bits([{2: 1.0, 3: 1.0}, {2: 1.0, 3: 0.5}], [1, 1], 3) == [2, 3]


def test_the_losses_are_those_of_the_model_with_that_block_rounded(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(tiny["llama"])
    tokens = torch.randint(3, VOCABULARY, (3, 32), generator=torch.Generator().manual_seed(0))
    request = QuantizeRequest(RTN(bits=3, group_size=16, symmetric=True), model, tmp_path / "out", Options())
    levels = [Scheme(bits, 16, True) for bits in (2, 3)]
    found = block_losses(request, Walk(model, tokens, Where(CPU, torch.float32)), levels, lambda *_: None)
    assert [sorted(loss) for loss in found] == [[2, 3]] * model.block_count
    assert all(loss[3] < loss[2] for loss in found)
    for wanted in range(model.block_count):
        walk = Walk(model, tokens, Where(CPU, torch.float32))
        for block in walk:
            if block.index == wanted:
                block.hand_over(_rounded_outputs(block, request, levels[:1])[2])
        dense = Walk(model, tokens, Where(CPU, torch.float32))
        for _ in dense:
            pass
        total = sum(
            float(torch.nn.functional.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum"))
            for (_, _, a), (_, _, b) in zip(walk.logits(), dense.logits(), strict=True)
        )
        assert abs(total / tokens.numel() - found[wanted][2]) < 1e-5 + 1e-3 * total / tokens.numel()


def test_the_levels_lie_around_the_average() -> None:
    assert GPTQ(bits=2.5).levels == (2, 3, 4)
    assert GPTQ(bits=7.5).levels == (7, 8)
    assert GPTQ(bits=4).levels == (4,)
