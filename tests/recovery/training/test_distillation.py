"""recovery/training/distillation.py: the teacher by stock models, losses and gradients by their definitions. Oracle tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recovery_data import asked_of, killed_after_a_chunk, samples_of, stock_logits
from small_files import small_files

from compresskit.errors import CheckpointError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.forward import open_walk
from compresskit.recovery.training.distillation import distillation_losses, predict, width_of, with_hard_targets

CPU = torch.device("cpu")


@pytest.mark.usefixtures("chunks_of_two")
def test_the_original_is_not_asked_again_what_it_said_before_a_kill(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, samples = open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32)), samples_of()
    predict(walk, samples, range(4), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        predict(walk, samples, range(4), tmp_path / "teacher", killed_after_a_chunk)
    asked = asked_of(monkeypatch, "training.distillation")
    predict(walk, samples, range(4), tmp_path / "teacher")
    assert asked == [2]
    for file in ("tokens.i32", "log_probabilities.f16"):
        assert (tmp_path / "teacher" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_disk_without_room_for_the_predictions_is_said_before_the_original_is_asked(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asked_of(monkeypatch, "training.distillation")
    walk = open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32))
    with small_files(1000), pytest.raises(CheckpointError, match=r"tokens\.i32: no room .*; free some space"):
        predict(walk, samples_of(), range(4), tmp_path / "teacher")
    assert not asked
    predict(walk, samples_of(), range(4), tmp_path / "teacher")
    assert sum(asked) == 4


def test_the_teacher_keeps_the_originals_top_tokens_of_every_position(tiny: dict[str, Path], tmp_path: Path) -> None:
    samples = samples_of()
    width = width_of(259)
    teacher = predict(open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32)), samples, range(4), tmp_path / "teacher")
    for index, sample in enumerate(samples):
        tokens, values = teacher.read(index)
        expected = stock_logits(tiny["llama"], torch.tensor([sample.tokens]))[0, :-1].log_softmax(-1)
        assert torch.allclose(values, expected.gather(-1, tokens), atol=5e-3)
        assert torch.allclose(values, expected.topk(width).values, atol=5e-3)


def test_distillation_is_the_divergence_of_the_merged_distributions_and_0_at_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64)
    top = teacher.log_softmax(-1).topk(5)
    p, q = (logits.softmax(-1).gather(-1, top.indices) for logits in (teacher, student))
    p, q = (torch.cat([each, 1 - each.sum(-1, keepdim=True)], dim=-1) for each in (p, q))
    found = distillation_losses(student, top.indices, top.values)
    assert torch.allclose(found, (p * (p / q).log()).sum(-1))
    assert torch.allclose(distillation_losses(teacher, top.indices, top.values), torch.zeros(6, dtype=torch.float64), atol=1e-9)


@given(st.integers(0, 1000), st.floats(0.1, 30), st.sampled_from((1, 3, 4)))
def test_the_gradient_of_distillation_is_that_of_its_definition(seed: int, scale: float, positions: int) -> None:
    """`positions`: so many are computed at a time."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = scale * torch.randn(2, 4, 20, generator=generator, dtype=torch.float64)
    top = teacher.log_softmax(-1).topk(5)
    stored = top.values.half().double()
    student.requires_grad_()
    weights = torch.rand(4, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compresskit.recovery.training.distillation.CHUNK_BYTES", positions * 20 * 4)
        (distillation_losses(student, top.indices, stored) * weights).sum().backward()
    found, student.grad = student.grad, None
    said = student.log_softmax(-1)
    p = torch.cat([stored.exp(), (1 - stored.exp().sum(-1, keepdim=True)).clamp(min=1e-6)], dim=-1)
    rest = said.scatter(-1, top.indices, -torch.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([said.gather(-1, top.indices), rest], dim=-1)
    ((p * (p.log() - log_q)).sum(-1) * weights).sum().backward()
    assert found is not None and student.grad is not None
    assert torch.allclose(found, student.grad, atol=1e-9)


@given(st.integers(0, 1000), st.floats(0, 1))
def test_hard_targets_among_the_kept_tokens_add_their_cross_entropy_to_the_gradient(seed: int, weight: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, 6, 20, generator=generator, dtype=torch.float64)
    top = teacher.log_softmax(-1).topk(5)
    targets = top.indices[:, seed % 5]
    student.requires_grad_()
    mixed = with_hard_targets(top.indices, top.values, targets, torch.full((6,), weight, dtype=torch.float64))
    (found,) = torch.autograd.grad(distillation_losses(student, *mixed).sum(), student)
    alone = distillation_losses(student, top.indices, top.values)
    both = (1 - weight) * alone + weight * torch.nn.functional.cross_entropy(student, targets, reduction="none")
    (expected,) = torch.autograd.grad(both.sum(), student)
    # The rest of all other tokens is counted as 1e-6 at least.
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_a_hard_target_that_was_not_kept_takes_the_place_of_the_least_likely_token(weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(6, 20, generator=generator, dtype=torch.float64).log_softmax(-1)
    top, before = teacher.topk(5), teacher.exp()
    targets = teacher.argmin(dim=-1)
    tokens, values = with_hard_targets(top.indices, top.values, targets, torch.full((6,), weight, dtype=torch.float64))
    assert torch.equal(tokens[:, :-1], top.indices[:, :-1])
    assert torch.equal(tokens[:, -1], targets if weight else top.indices[:, -1])
    mixture = (1 - weight) * before
    assert torch.allclose(values[:, :-1].exp(), mixture.gather(-1, tokens[:, :-1]))
    assert torch.allclose(
        values[:, -1].exp(), torch.full((6,), weight, dtype=torch.float64) if weight else top.values[:, -1].exp()
    )
