"""Divergence, embeddings, losses and the teacher: against scipy, and against whole stock models run sample by sample."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from small_files import small_files
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM

from compresskit.errors import CheckpointError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.held_back import mean_losses
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.forward import chunks, mean_hidden, open_walk, response_losses, walked
from compresskit.recovery.selection.degradation import degradations, jensen_shannon
from compresskit.recovery.selection.embeddings import centred, own_states
from compresskit.recovery.training.batches import TrainingData, collate
from compresskit.recovery.training.distillation import distillation_losses, predict, width_of, with_hard_targets

CPU = torch.device("cpu")


@torch.no_grad()
def stock_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Of the whole model, as transformers loads it."""
    logits: torch.Tensor = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits
    return logits


def samples_of(lengths: tuple[int, ...] = (9, 30, 17, 24)) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (length,), generator=generator).tolist() for length in lengths]
    return [Sample(Instruction(i, "f", [], "", "s"), row, 4) for i, row in enumerate(rows)]


@given(st.integers(0, 1000), st.floats(0.1, 30))
@example(393, 24.0)  # scipy's own jensenshannon takes the root of a rounding error below 0 there
def test_divergence_is_scipys_and_lies_between_0_and_log_2(seed: int, scale: float) -> None:
    relative_entropy = pytest.importorskip("scipy.special").rel_entr
    generator = torch.Generator().manual_seed(seed)
    first, second = scale * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64)
    found = jensen_shannon(first, second)
    for row, p, q in zip(found, first.softmax(-1).numpy(), second.softmax(-1).numpy(), strict=True):
        middle = (p + q) / 2
        expected = (relative_entropy(p, middle) + relative_entropy(q, middle)).sum() / 2
        assert float(row) == pytest.approx(float(expected), abs=1e-9)
        assert 0 <= float(row) <= math.log(2)
    assert torch.equal(jensen_shannon(first, first), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("size", [2, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_padded_samples_are_those_of_each_sample_alone(
    family: str, size: int, tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right padding changes nothing to its left, in any family, and micro-batches of one size may have several lengths."""
    monkeypatch.setattr("compresskit.recovery.forward.micro_batch_size", lambda model, length: size)
    samples = samples_of()
    losses = dict(response_losses(open_walk(open_model(tiny[family]), Where(CPU, torch.float32)), samples))
    for index, sample in enumerate(samples):
        tokens = torch.tensor([sample.tokens])
        logits = stock_logits(tiny[family], tokens)[0, sample.response_start - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, tokens[0, sample.response_start :])
        assert losses[index] == pytest.approx(float(expected), abs=2e-4)


def test_held_back_losses_count_samples_alike_or_their_tokens(tiny: dict[str, Path]) -> None:
    samples = samples_of()
    found = mean_losses(open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32)), samples, None)
    said = []
    for sample in samples:
        logits = stock_logits(tiny["llama"], torch.tensor([sample.tokens]))[0, sample.response_start - 1 : -1]
        answer = torch.tensor(sample.tokens[sample.response_start :])
        said.append(torch.nn.functional.cross_entropy(logits, answer, reduction="none"))
    assert found["loss"] == pytest.approx(float(torch.stack([each.mean() for each in said]).mean()), abs=2e-4)
    assert found["loss_by_token"] == pytest.approx(float(torch.cat(said).mean()), abs=2e-4)
    assert abs(found["loss"] - found["loss_by_token"]) > 1e-3


def test_degradations_are_means_over_response_tokens_and_0_for_equal_models(tiny: dict[str, Path], tmp_path: Path) -> None:
    samples = samples_of()
    other = make_model(tmp_path / "other", "llama", seed=1)
    walks = [open_walk(open_model(folder), Where(CPU, torch.float32)) for folder in (tiny["llama"], other)]
    divergences, losses, states = degradations(walks[0], walks[1], samples)
    assert torch.allclose(states, own_states(walks[1], samples), atol=1e-5)
    for divergence, loss, sample in zip(divergences, losses, samples, strict=True):
        first, second = (stock_logits(each, torch.tensor([sample.tokens]))[0] for each in (tiny["llama"], other))
        part = slice(sample.response_start - 1, -1)
        assert divergence == pytest.approx(float(jensen_shannon(first[part], second[part]).mean()), abs=1e-5)
        answer = torch.tensor(sample.tokens[sample.response_start :])
        before, after = (torch.nn.functional.cross_entropy(each[part], answer) for each in (first, second))
        assert loss == pytest.approx(float(after - before), abs=1e-4)
    for equal in degradations(walks[0], walks[0], samples)[:2]:
        assert equal == pytest.approx([0] * len(samples), abs=1e-7)


def killed_after_a_chunk(done: int, total: int) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def chunks_of_two(monkeypatch: pytest.MonkeyPatch, tiny: dict[str, Path]) -> None:
    """Of the four samples below the longest two come first."""
    monkeypatch.setattr("compresskit.recovery.forward.HIDDEN_BYTES", 65 * 4 * open_model(tiny["llama"]).hidden_size)
    assert [len(chunk) for chunk in chunks(samples_of(), open_model(tiny["llama"]).hidden_size)] == [2, 2]


def asked_of(monkeypatch: pytest.MonkeyPatch, module: str) -> list[int]:
    """Fills up with the number of samples of every walk that the module makes."""
    found: list[int] = []
    monkeypatch.setattr(
        f"compresskit.recovery.{module}.walked", lambda walks, part: found.append(len(part)) or walked(walks, part)
    )
    return found


@pytest.mark.usefixtures("chunks_of_two")
def test_what_was_measured_before_a_kill_is_not_measured_again(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, other = samples_of(), make_model(tmp_path / "other", "llama", seed=1)
    walks = [open_walk(open_model(folder), Where(CPU, torch.float32)) for folder in (tiny["llama"], other)]
    *whole, states = degradations(walks[0], walks[1], samples)
    with pytest.raises(KeyboardInterrupt):
        degradations(walks[0], walks[1], samples, killed_after_a_chunk, tmp_path / "lost")
    asked = asked_of(monkeypatch, "selection.degradation")
    *found, found_states = degradations(walks[0], walks[1], samples, None, tmp_path / "lost")
    assert asked == [2]
    assert found == whole
    assert torch.equal(found_states, states)


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


def test_embeddings_are_means_over_each_samples_own_tokens(tiny: dict[str, Path]) -> None:
    samples = samples_of()
    walk = open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32))
    together = own_states(walk, samples)
    assert torch.allclose(centred(together).norm(dim=1), torch.ones(len(samples)))
    alone = torch.cat([mean_hidden(walked([walk], [sample])[0], [sample]) for sample in samples])
    assert torch.allclose(together, alone, atol=1e-4)


def test_micro_batches_are_as_long_as_their_own_longest_sample(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresskit.recovery.forward.micro_batch_size", lambda model, length: 2)
    (done,) = walked([open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32))], samples_of((30, 24, 17, 9, 5)))
    assert [tuple(hidden.shape[:2]) for hidden in done.hidden] == [(2, 30), (2, 17), (1, 5)]


def test_chunks_hold_every_sample_once_longest_first() -> None:
    samples = samples_of((5, 9, 7, 9, 3))
    found = chunks(samples, hidden_size=1 << 22)
    assert sorted(i for chunk in found for i in chunk) == list(range(5))
    assert [len(samples[i].tokens) for chunk in found for i in chunk] == [9, 9, 7, 5, 3]
    assert len(found) > 1


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


@pytest.mark.parametrize("packed", [True, False])
def test_hard_targets_are_mixed_in_at_every_token_of_the_samples_that_have_a_weight(
    tiny: dict[str, Path], tmp_path: Path, packed: bool
) -> None:
    samples = samples_of()
    teacher = predict(open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32)), samples, range(4), tmp_path / "teacher")
    weights = [0.5, 0.0, 1.0, 0.25]
    # Two micro-batches of two samples each: weights go with the samples, not with their places.
    steps = [[(3, 0), (1, 2)]]
    learned = TrainingData(samples, [True] * 4, steps, teacher, weights, 1e-3, 0, 20, "float32", packed)
    for members, batch in zip(steps[0], collate(learned, 0), strict=True):
        ends = [len(samples[i].tokens) - 1 for i in members]
        for i, top, values in zip(members, batch["top"].split(ends), batch["values"].split(ends), strict=True):
            before = teacher.read(i)
            targets = torch.tensor(samples[i].tokens[1:])
            expected = with_hard_targets(*before, targets, torch.full((ends[members.index(i)],), weights[i]))
            assert torch.equal(top, expected[0])
            assert torch.equal(values, expected[1])
            said = values.exp()[top == targets[:, None]]
            assert weights[i] == 0 or (len(said) == len(targets) and bool((said >= weights[i] - 1e-6).all()))
