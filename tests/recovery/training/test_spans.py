"""recovery/training/spans.py, recovery/training/span.py: gradients against stock networks (oracle), and whole runs."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from family_stages import write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from recovery_data import options, samples_of
from stock_tools import tokens, walked_logits
from torch import nn
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.small_files import read_json
from compresskit.errors import NumericalError, RequestError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.recovery.cost import instruction_size, training_bytes
from compresskit.recovery.forward import open_walk
from compresskit.recovery.request import RecoverRequest
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Random
from compresskit.recovery.training import spans
from compresskit.recovery.training.grid import GridModel
from compresskit.recovery.training.networks import whole_network
from compresskit.recovery.training.span import Span, hidden_loss, predicted_loss
from compresskit.stages import Options
from compresskit.walk.cost import head_share
from compresskit.walk.walk import Walk

pytest.importorskip("scipy")

CPU = Where(torch.device("cpu"), torch.float32)
FEW: dict[str, Any] = {"pool": 8, "steps": 2, "update": "grid", "learning_rate": 1e-2, "precision": "float32"}


@pytest.fixture(scope="module")
def lows(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two families in 2 bits, of three blocks each."""
    root = tmp_path_factory.mktemp("lows")
    for family, symmetric in (("llama", False), ("qwen2", True)):
        method = RTN(bits=2, group_size=16, symmetric=symmetric)
        quantize(method, str(tiny[family]), root / family, Options(samples=2, sequence_length=64))
    return {family: root / family for family in ("llama", "qwen2")}


@given(st.integers(1, 40), st.data())
def test_every_block_is_in_one_span_and_the_last_span_is_full(blocks: int, drawn: st.DataObject) -> None:
    size = drawn.draw(st.integers(1, blocks))
    found = spans._spans(blocks, size)
    assert [index for span in found for index in span] == list(range(blocks))
    assert all(len(span) == size for span in found[1:]) and len(found[-1]) == size and found[0]


def ready(folder: Path, span: range, rows: list[torch.Tensor]) -> tuple[GridModel, list[Any], Walk, Walk]:
    """A span in a network of its own, its blocks, that network's walk, and the walk that gives its inputs."""
    student, own = open_walk(open_model(folder), CPU), open_walk(open_model(folder), CPU)
    student.all_batches = rows
    with torch.no_grad():
        calls = student.capture()
    for index in range(span.start):
        with torch.no_grad():
            student.filled(index, student.hidden, calls[index]).advance()
    grid, blocks = spans.opened(own, span, calls, None)
    return grid, blocks, own, student


def by_hand(network: nn.Module, grid: GridModel) -> dict[str, torch.Tensor]:
    """Equation 3 and 4 of grid.py on the gradients of a stock network's weights: those of scales, norms and biases."""
    found = {}
    for name, weight in network.named_parameters():
        linear = name.removesuffix(".weight")
        if linear in grid.linears and weight.grad is not None:
            groups = (weight.grad * weight).reshape(len(weight), -1, 16).sum(-1)
            found[f"network.{linear}.parametrizations.scale.original"] = groups
        elif name in grid.vectors and weight.grad is not None:
            path, _, leaf = name.rpartition(".")
            found[f"network.{path}.parametrizations.{leaf}.original"] = weight.grad * weight.abs()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_gradients_of_two_blocks_are_those_of_a_stock_network(
    family: str, tiny: dict[str, Path], lows: dict[str, Path]
) -> None:
    """The hidden states after the second of three blocks, in float64."""
    rows = [torch.tensor([sample.tokens]) for sample in samples_of()]
    grid, blocks, _, student = ready(lows[family], range(2), rows)
    dense, low = (AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float64).eval() for _ in range(2))
    for name in grid.linears:
        low.get_submodule(name).weight.data = grid.network.get_submodule(name).weight.detach().double()
    with torch.no_grad():
        targets = [dense(row, output_hidden_states=True).hidden_states[2] for row in rows]
    energies = [target.square().mean(-1) for target in targets]
    median = torch.cat([each.flatten() for each in energies]).sort().values[(sum(each.numel() for each in energies) - 1) // 2]
    expected, places = 0.0, 0
    for row, target, energy in zip(rows[:3], targets, energies, strict=False):
        errors = (low(row, output_hidden_states=True).hidden_states[2] - target).square().mean(-1) / energy.clamp_min(median)
        errors.sum().backward()
        expected, places = expected + float(errors.detach().sum()), places + errors.numel()
    span = Span(blocks, student.hidden, hidden_loss([target.float() for target in targets]), "float32")
    losses = [span.summed_loss(number) for number in range(3)]
    torch.autograd.backward([total for total, _ in losses])
    assert sum(count for _, count in losses) == places
    assert float(sum(total.detach() for total, _ in losses)) == pytest.approx(expected, rel=1e-5)
    assert span.mean_loss(range(3)) == pytest.approx(expected / places, rel=1e-5)
    wanted, trained = by_hand(low, grid), {name: p.grad for name, p in grid.named_parameters() if p.requires_grad}
    assert wanted.keys() == trained.keys() and len(wanted) > 2 * 7
    for name, gradient in wanted.items():
        assert torch.allclose(trained[name].double(), gradient, rtol=1e-3, atol=1e-5 * float(gradient.detach().abs().max())), name


def test_a_span_of_all_blocks_learns_what_the_whole_network_does(lows: dict[str, Path]) -> None:
    """Its loss and gradients are those of the stock network's cross-entropy, the final norm's too."""
    rows = [torch.tensor([sample.tokens]) for sample in samples_of((9, 14))]
    grid, blocks, own, student = ready(lows["llama"], range(3), rows)

    def batch(number: int) -> dict[str, torch.Tensor]:
        places = torch.arange(rows[number].shape[1] - 1)
        return {"kept": places, "columns": places, "rows": torch.zeros_like(places), "targets": rows[number][0, 1:]}

    span = Span(blocks, student.hidden, predicted_loss(own.head, batch), "float32")
    whole = GridModel(whole_network(open_model(lows["llama"]), CPU), open_model(lows["llama"]), None)
    for number, row in enumerate(rows):
        total, places = span.summed_loss(number)
        total.backward()
        logits = whole(input_ids=row, use_cache=False).logits
        expected = nn.functional.cross_entropy(logits[0, :-1], row[0, 1:], reduction="sum")
        expected.backward()
        assert places == row.shape[1] - 1 and float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    wanted = {name: p.grad for name, p in whole.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in grid.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys() and any(".norm." in name for name in found)
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-6) for name in wanted)


@pytest.mark.parametrize(("family", "train", "size"), [("llama", "scales", 1), ("qwen2", "all", 2)])
def test_a_low_bit_model_keeps_its_format_and_comes_nearer_block_by_block(
    family: str, train: str, size: int, tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = options(tiny[family], data, **FEW | {"steps": 6}, train=train, blocks_at_once=size, code_distance=0.1)
    result = recover(Random(budget=1.0), str(lows[family]), tmp_path / "out", asked)
    report = read_json(tmp_path / "out" / "recover.json")
    assert [span["blocks"] for span in report["spans"]] == ([[0, 0], [1, 1], [2, 2]] if size == 1 else [[0, 0], [1, 2]])
    assert "spans" not in result and report["kept"] == "trained" and report["steps"] == len(report["losses"]) == 6
    assert all(span["kept"] == "trained" and span["after"] < span["before"] for span in report["spans"])
    assert report["judged"]["after"] == pytest.approx(result["held_back_after"]["loss_by_token"], abs=1e-3)
    assert report["judged"]["before"] == pytest.approx(result["held_back_before"]["loss_by_token"], abs=1e-3)
    before, after = (open_model(folder) for folder in (lows[family], tmp_path / "out"))
    specs = [{n: (s.dtype, s.shape) for n, s in each.checkpoint.tensors.items()} for each in (before, after)]
    assert specs[0] == specs[1] and before.checkpoint.config == after.checkpoint.config
    changed = {n for n in specs[0] if not torch.equal(before.checkpoint.read(n), after.checkpoint.read(n))}
    assert all(any(f".{index}." in name and name.endswith("scale") for name in changed) for index in range(3))
    assert "model.norm.weight" in changed and any(name.endswith("packed") for name in changed) == (train == "all")
    assert not any("embed" in name or "zero_point" in name for name in changed)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(tmp_path / "out"), atol=1e-4)


@pytest.mark.usefixtures("own_structures")
def test_a_block_that_text_does_not_run_through_keeps_its_start(data: Path, tmp_path: Path) -> None:
    """The second of four blocks attends to images alone."""
    original, low = build("mllama", tmp_path / "original"), tmp_path / "low"
    write_tokenizer(original)
    quantize(RTN(bits=2, group_size=16, symmetric=True), str(original), low, Options(samples=2, sequence_length=64))
    asked = options(original, data, **FEW, blocks_at_once=1)
    recover(Random(budget=1.0), str(low), tmp_path / "out", asked)
    report = read_json(tmp_path / "out" / "recover.json")
    assert [span["kept"] for span in report["spans"]] == ["trained", "start", "trained", "trained"]


def test_an_interrupted_training_goes_on_after_its_finished_spans_and_ends_with_the_same_bytes(
    tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted one holds its hidden states in mapped files, and has no blocks in memory but those of the span."""
    asked = options(tiny["llama"], data, **FEW, train="all", blocks_at_once=1, held_back=0.0)
    recover(Random(budget=1.0), str(lows["llama"]), tmp_path / "whole", asked)
    train, opened, networks, trained = spans.train_span, spans.open_walk, [], []

    def recorded(*arguments: Any) -> Walk:
        walk = opened(*arguments)
        networks.append(weakref.ref(walk.network))
        return walk

    def interrupted(span: Span, *rest: Any) -> Any:
        held = []
        for network in (each() for each in networks):
            blocks = network.model.layers if network is not None else []
            held += [i for i, block in enumerate(blocks) if any(not p.is_meta for p in block.parameters())]
        assert held == [span.blocks[0].index]
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(span.blocks[0].index)
        return train(span, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("compresskit.walk.walk.lie_on_disk", lambda *_: True)
        patched.setattr(spans, "train_span", interrupted)
        patched.setattr(spans, "open_walk", recorded)
        recover(Random(budget=1.0), str(lows["llama"]), tmp_path / "out", asked)
    again: list[int] = []
    monkeypatch.setattr(spans, "train_span", lambda span, *rest: again.append(span.blocks[0].index) or train(span, *rest))
    recover(Random(budget=1.0), str(lows["llama"]), tmp_path / "out", asked.model_copy(update={"resume": True}))
    assert trained == [0, 1] and again == [2]
    digests = [sha256(folder / "model.safetensors") for folder in (tmp_path / "whole", tmp_path / "out", lows["llama"])]
    assert digests[0] == digests[1] != digests[2]
    reports = [read_json(tmp_path / name / "recover.json") for name in ("whole", "out")]
    assert reports[0]["spans"] == reports[1]["spans"] and reports[0]["judged"] is None


def test_spans_that_training_harms_keep_their_start(
    tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = options(tiny["llama"], data, **FEW | {"learning_rate": 20.0}, blocks_at_once=2)
    recover(Random(budget=1.0), str(lows["llama"]), tmp_path / "out", asked)
    report = read_json(tmp_path / "out" / "recover.json")
    assert [span["kept"] for span in report["spans"]] == ["start"] * 2 and report["kept"] == "start"
    assert report["judged"]["before"] == report["judged"]["after"]
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(lows["llama"] / "model.safetensors")


def test_a_model_that_is_worse_on_held_back_responses_is_not_written(
    tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [1.5, 2.5]
    monkeypatch.setattr(spans, "_response_loss", lambda *_: said.pop(0))
    asked = options(tiny["llama"], data, **FEW, blocks_at_once=3)
    recover(Random(budget=1.0), str(lows["llama"]), tmp_path / "out", asked)
    report = read_json(tmp_path / "out" / "recover.json")
    assert report["kept"] == "start" and report["spans"][0]["kept"] == "trained"
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(lows["llama"] / "model.safetensors")


def test_a_loss_that_is_no_number_names_the_step_and_the_remedy(
    tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = options(tiny["llama"], data, **FEW | {"learning_rate": 1e30}, blocks_at_once=3)
    with pytest.raises(NumericalError, match=r"training blocks 0 to 2: .*lower --learning-rate"):
        recover(Random(budget=1.0), str(lows["llama"]), tmp_path / "out", asked)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"update": "low-rank"}, "--blocks-at-once 1: trains a grid .* give --update grid"),
        ({"blocks_at_once": 4}, "--blocks-at-once 4: .* has 3 blocks; leave it out"),
        ({"loss": "response"}, "leave --loss response out"),
        ({"gradient_checkpointing": True}, "leave --gradient-checkpointing out"),
    ],
)
def test_what_cannot_be_trained_block_by_block_is_refused(
    changes: dict[str, Any], message: str, tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = options(tiny["llama"], data, **{"update": "grid", "blocks_at_once": 1} | changes)
    with pytest.raises(RequestError, match=message):
        recover(Random(), str(lows["llama"]), tmp_path / "out", asked)
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(
    tiny: dict[str, Path], lows: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match="--blocks-at-once 1: does not share its work among processes, torchrun started 2"):
        recover(Random(), str(lows["llama"]), tmp_path / "out", options(tiny["llama"], data, update="grid", blocks_at_once=1))


@pytest.mark.parametrize(("train", "each"), [("scales", 5), ("all", 20)])
def test_memory_is_that_of_the_blocks_that_are_trained_together(
    train: str, each: int, tiny: dict[str, Path], lows: dict[str, Path], data: Path
) -> None:
    model = open_model(lows["llama"])
    sizes = [
        training_bytes(
            model, None, options(tiny["llama"], data, update="grid", train=train, blocks_at_once=size, code_distance=0.1)
        )
        for size in (1, 2, 3)
    ]
    shapes = [model.linear_shape(name) for name in model.block_linears(0)]
    block = each * sum(math.prod(shape) for shape in shapes) + 4 * 256 * sum(map(sum, shapes))
    assert sizes[1] - sizes[0] == sizes[2] - sizes[1] == block


def test_a_plan_counts_the_passes_of_both_streams(tiny: dict[str, Path], lows: dict[str, Path], data: Path) -> None:
    """Two passes of the 8 samples that are trained on, and two of the half as many that judge."""
    samples, length = instruction_size(options(tiny["llama"], data))
    assert samples == 40
    counted = []
    for size in (0, 1):
        asked = options(tiny["llama"], data, update="grid", pool=8, held_back=0.5, blocks_at_once=size)
        request = RecoverRequest(Random(budget=1.0), open_model(lows["llama"]), Path("out"), asked)
        counted.append(request.passes() / (1 + head_share(request.model)))
    assert counted[1] - counted[0] == pytest.approx(2 * 8 * length + 2 * 0.5 * 8 * length)
