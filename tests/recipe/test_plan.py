"""recipe/plan.py: what a plan says is what then happens, for every method, its switches and every family. End to end.

Bytes are exact. Where the text decides widths, bits or ranks, the plan states their sum: the numbers in the headers differ
by their digits, and a budget may end a linear's pair short.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from tiny_models import FAMILIES, make_adapter, make_model

from compresskit import prune, quantize
from compresskit.checkpoint.reader import tensors_in
from compresskit.cli.main import main
from compresskit.compensation.request import CompensateOptions, CompensateRequest
from compresskit.compensation.run import compensate
from compresskit.errors import RequestError
from compresskit.methods import METHODS, method_class
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.load import open_model
from compresskit.recipe.plan import plan, table
from compresskit.recipe.reading import load
from compresskit.recipe.run import run
from compresskit.recovery.request import RecoverRequest
from compresskit.task_vectors.merge_request import MergeRequest
from compresskit.task_vectors.request import MergeOptions
from compresskit.walk import cost

HEAD = "source: {source}\ndefaults: {{calibration: {text}, samples: 2, sequence_length: 32}}\nsteps:\n"
HEADER_BYTES = 64
"""By which the headers of a few files differ when a width or a rank has another number of digits."""

PRUNE = ("allocation: uniform", "allocation: uniform, refit: false", "layout: padded, allocation: uniform", "sparsity: 0")
PRUNE_BY_TEXT = ("allocation: cfsp", "allocation: cfsp, refit: false", "allocation: global", "max_shard_size: 50KB")
GRID = ("bits: 2", "bits: 8", "bits: 3, symmetric: true", "ignore: [down]", "embedding_bits: 16", "group_size: 0")
QUANTIZE = {
    "rtn": GRID,
    "gptq": ("bits: 2", "bits: 8", "embedding_bits: 16"),
    "apiq": (*(f"{each}, epochs: 0" for each in GRID[1:4]), "epochs: 0, rank: 0", "epochs: 0, adapter_bits: 8"),
    "nf4": ("nested: true", "nested: false", "block_size: '128'"),
}
COMPENSATE = ("rank: 2", "rank: 2, merge: true", "rank: 2, adapter_bits: 8", "rank: 3, ignore: [down]", "rank: 2, aim: block")
PATH = "  - {prune: cfsp, round_to: 8}\n  - {quantize: gptq, bits: 4, group_size: 8}\n  - {compensate: eora, original: source}\n"
UNLIKE = ("compeft", "depth", "vocabulary", "reap", "m-smoe", "ream", "frequency", "random-experts")
"""Methods that do not have the switches of their stage's others."""
RECOVER = ("rank: 3", "select_only: true", "adapter_only: true", "update: full", "update: grid")
Steps = Callable[..., list[tuple[int, int]]]


@pytest.fixture
def planned_and_written(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> Steps:
    """Plan and run steps of a family, or of another source; (planned, written) bytes of each step's weight files."""

    def call(*steps: str, family: str = "llama", source: Path | None = None) -> list[tuple[int, int]]:
        path = tmp_path / "recipe.yaml"
        lines = "".join(f"  - {{{step}}}\n" for step in steps)
        path.write_text(HEAD.format(source=source or tiny[family], text=text_file) + lines)
        rows = plan(load(path), probe=False)["steps"]
        run(load(path), tmp_path / "out")
        found = []
        for row in rows:
            files = (tmp_path / "out" / row["step"]).rglob("*.safetensors")
            found.append((row["disk_bytes"], sum(file.stat().st_size for file in files)))
        return found

    return call


@pytest.fixture(scope="module")
def compressed(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compressed models that are repaired and recovered below."""
    root = tmp_path_factory.mktemp("compressed")
    shared = {"calibration": text_file, "samples": 2, "sequence_length": 32, "quiet": True}
    prune(tiny["llama"], root / "ragged", "cfsp", sparsity=0.3, allocation="global", round_to=8, **shared)
    quantize(tiny["llama"], root / "low-bit", "rtn", bits=2, group_size=8, **shared)
    quantize(tiny["llama"], root / "with-adapter", "apiq", bits=2, group_size=8, epochs=0, rank=2, **shared)
    return {path.name: path for path in root.iterdir()}


def method_cases(stage: str, switches: dict[str, tuple[str, ...]] | tuple[str, ...]) -> list[ParameterSet]:
    """The stage's first method with every switch, the others with one, or with their own; those are marked slow."""
    first = next(iter(METHODS[stage]))
    found = []
    for name in (name for name in METHODS[stage] if name not in UNLIKE):
        chosen = switches[name] if isinstance(switches, dict) else switches if name == first else switches[:1]
        found += [pytest.param(name, switch, marks=() if name == first else pytest.mark.slow) for switch in chosen]
    return found


def test_every_stage_that_knows_its_files_beforehand_is_planned() -> None:
    assert set(QUANTIZE) == set(METHODS["quantize"]) - {"compeft"}


@pytest.mark.parametrize(("method", "switch"), method_cases("prune", PRUNE))
def test_a_pruning_is_planned_to_the_byte(method: str, switch: str, planned_and_written: Steps) -> None:
    share = "" if "sparsity" in switch else "sparsity: 0.3, "
    ((planned, written),) = planned_and_written(f"prune: {method}, {share}round_to: 8, {switch}")
    assert planned == written


@pytest.mark.parametrize(("method", "switch"), method_cases("prune", PRUNE_BY_TEXT))
def test_a_pruning_whose_widths_the_text_decides_is_planned_by_their_sum(
    method: str, switch: str, planned_and_written: Steps
) -> None:
    ((planned, written),) = planned_and_written(f"prune: {method}, sparsity: 0.3, round_to: 1, {switch}")
    assert abs(planned - written) <= HEADER_BYTES


@pytest.mark.parametrize("switch", ["blocks: 2, choose: run"])
def test_a_model_with_fewer_blocks_is_planned_to_the_byte(switch: str, planned_and_written: Steps) -> None:
    """The step after it is planned on the model that it makes."""
    for planned, written in planned_and_written(f"prune: depth, {switch}", "quantize: rtn, bits: 4, group_size: 8"):
        assert planned == written


@pytest.mark.parametrize("method", ["reap", pytest.param("ream", marks=pytest.mark.slow)])
def test_a_model_with_fewer_experts_is_planned_to_the_byte(method: str, planned_and_written: Steps) -> None:
    """The step after it is planned on the model that it makes."""
    steps = f"prune: {method}, experts: 3", "quantize: rtn, bits: 4, group_size: 8"
    for planned, written in planned_and_written(*steps, family="mixtral"):
        assert planned == written


def test_widths_that_pad_to_the_widest_block_are_planned_at_most(planned_and_written: Steps) -> None:
    ((planned, written),) = planned_and_written("prune: cfsp, sparsity: 0.3, layout: padded")
    assert written <= planned


@pytest.mark.parametrize(("method", "switch"), method_cases("quantize", QUANTIZE))
def test_a_quantization_is_planned_to_the_byte(method: str, switch: str, planned_and_written: Steps) -> None:
    group = "" if method == "nf4" or "group_size" in switch else "group_size: 8, "
    ((planned, written),) = planned_and_written(f"quantize: {method}, {group}{switch}")
    assert planned == written


@pytest.mark.parametrize("method", ["rtn", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gptq", "apiq"))])
def test_mixed_precision_is_planned_by_its_average(method: str, planned_and_written: Steps) -> None:
    rest = ", epochs: 0, rank: 0" if method == "apiq" else ""
    ((planned, written),) = planned_and_written(f"quantize: {method}, bits: 2.5, group_size: 8{rest}")
    assert planned == pytest.approx(written, rel=0.02)


def repair_cases() -> list[ParameterSet]:
    """Every method with its switches on a low-bit model, two methods on the others."""
    found = [pytest.param(*case.values, "low-bit", marks=case.marks) for case in method_cases("compensate", COMPENSATE)]
    others = [(name, switch, "with-adapter") for name in ("eora", "corda") for switch in ("rank: 2", "rank: 2, adapter_bits: 8")]
    others += [(name, "rank: 2", "ragged") for name in ("eora", "corda")] + [("corda", "rank: 2, merge: true", "low-bit")]
    return found + [pytest.param(*case, marks=pytest.mark.slow) for case in others]


@pytest.mark.parametrize(("method", "switch", "source"), repair_cases())
def test_a_repair_is_planned_to_the_byte(
    method: str, switch: str, source: str, compressed: dict[str, Path], tiny: dict[str, Path], planned_and_written: Steps
) -> None:
    step = f"compensate: {method}, original: {tiny['llama']}, {switch}"
    if (method == "corda" and "merge" in switch) or (source == "with-adapter" and "adapter_bits" in switch and method != "corda"):
        with pytest.raises(RequestError, match=r"--merge"):
            planned_and_written(step, source=compressed[source])
        return
    ((planned, written),) = planned_and_written(step, source=compressed[source])
    assert planned == written


@pytest.mark.parametrize("method", METHODS["compensate"])
def test_a_repair_within_a_budget_is_planned_by_the_budget(
    method: str, compressed: dict[str, Path], tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    options = CompensateOptions(original=str(tiny["llama"]), calibration=str(text_file), samples=2, sequence_length=32)
    chosen = method_class("compensate", method)(rank_budget=0.2)
    request = CompensateRequest(chosen, open_model(compressed["low-bit"]), tmp_path / "out", options)
    compensate(chosen, str(compressed["low-bit"]), tmp_path / "out", options)
    written = [spec.bytes for file in (tmp_path / "out").rglob("*.safetensors") for spec in tensors_in(file)]
    one_pair = 2 * (32 + 96)
    assert abs(sum(spec.bytes for spec in request.outputs().specs) - sum(written)) <= one_pair


@pytest.mark.slow
@pytest.mark.parametrize("source", ["ragged", "low-bit", "with-adapter"])
@pytest.mark.parametrize("switch", RECOVER)
def test_a_recovery_is_planned_to_the_byte(
    switch: str, source: str, compressed: dict[str, Path], tiny: dict[str, Path], tmp_path: Path, planned_and_written: Steps
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"say {i}", "output": f"word {i} " * 3}) + "\n" for i in range(8)))
    step = f"recover: random, original: {tiny['llama']}, data: {data}, budget: 0.5, steps: 1, sequence_length: 256, {switch}"
    if "full" in switch and source != "ragged":
        with pytest.raises(RequestError, match="--update full trains whole weights"):
            planned_and_written(step, source=compressed[source])
        return
    if "grid" in switch and source != "low-bit":
        with pytest.raises(RequestError, match="--update grid trains"):
            planned_and_written(step, source=compressed[source])
        return
    ((planned, written),) = planned_and_written(step, source=compressed[source])
    assert planned == written


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_planned_to_the_byte_from_step_to_step(family: str, planned_and_written: Steps) -> None:
    low_bit = "nf4" if ARCHITECTURES[family].transposed else "gptq, bits: 4, group_size: 8, symmetric: true"
    steps = (
        "prune: flap, sparsity: 0.25, round_to: 8, allocation: uniform",
        f"quantize: {low_bit}",
        "compensate: svd, original: prune, rank: 2, merge: true",
    )
    for planned, written in planned_and_written(*steps, family=family):
        assert planned == written


@pytest.mark.slow
def test_parameters_of_every_step_are_those_of_the_model_that_is_evaluated(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    evaluate = f"  - {{evaluate: , against: source, data: {text_file}, windows: 2, sequence_length: 64}}\n"
    steps = ("prune: cfsp, sparsity: 0.3, round_to: 8", "quantize: apiq, bits: 4, group_size: 8, epochs: 0, rank: 2",
             "compensate: eora, original: prune, rank: 2")  # fmt: skip
    lines = "".join(f"  - {{{step}}}\n{evaluate.replace('evaluate:', f'name: e{i}, evaluate:')}" for i, step in enumerate(steps))
    path.write_text(HEAD.format(source=tiny["llama"], text=text_file) + lines)
    planned = {row["step"]: row for row in plan(load(path), probe=False)["steps"]}
    for name, step in run(load(path), tmp_path / "out")["steps"].items():
        if step["stage"] == "evaluate":
            assert planned[name]["parameters"] == step["parameters"]
            assert abs(planned[name]["bytes"] - step["bytes"]) <= HEADER_BYTES


def test_a_longer_fine_tuning_is_planned_longer(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"instruction": "say", "input": "", "output": "something"}\n' * 20)
    common = "recover: full, original: source, data: '${here}/data.jsonl', self_samples: 4"
    lines = "".join(
        f"  - {{name: {name}, source: prune, {common}, {setting}}}\n"
        for name, setting in (
            ("once", "epochs: 1"),
            ("often", "epochs: 50"),
            ("steps", "steps: 500"),
            ("selection", "select_only: true"),
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD.format(source=tiny["llama"], text=text_file) + "  - {prune: cfsp, round_to: 8}\n" + lines)
    seconds = {row["step"]: row["seconds"] for row in plan(load(path))["steps"]}
    assert seconds["selection"] <= seconds["once"] < seconds["often"] < seconds["steps"]
    fixed = RecoverRequest.fixed_seconds
    assert seconds["once"] - fixed < (seconds["often"] - fixed) / 5


def test_a_configuration_without_weights_will_do(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(tiny["llama"] / "config.json", bare)
    path = tmp_path / "recipe.yaml"
    rows = []
    for source in (bare, tiny["llama"]):
        path.write_text(HEAD.format(source=source, text=text_file) + PATH)
        rows.append(plan(load(path), probe=False)["steps"])
    for bare_row, row in zip(*rows, strict=True):
        assert bare_row["parameters"] == row["parameters"]
        assert bare_row["bytes"] == pytest.approx(row["bytes"], rel=0.001)  # the order of tensors moves the headers a little


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (("prune: cfsp, sparsity: 0.25, round_to: 4", "quantize: rtn, group_size: 32"), r"--group-size 32: .* do not divide"),
        (("prune: cfsp, round_to: 1000",), "--round-to 1000: the widest FFN has 96 channels"),
        (("quantize: rtn, group_size: 8", "compensate: eora, original: source, rank: 200"), "--rank 200: exceeds"),
        (("quantize: rtn, group_size: 8", "recover: full, original: source"), "--data: no instruction data given"),
    ],
)
def test_a_plan_refuses_what_the_stage_would(
    steps: tuple[str, ...], said: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD.format(source=tiny["llama"], text=text_file) + "".join(f"  - {{{step}}}\n" for step in steps))
    with pytest.raises(RequestError, match=said):
        plan(load(path), probe=False)


@pytest.mark.parametrize(("share", "where"), [(0.25, "scratch files"), (math.inf, "memory")])
def test_a_plan_refuses_what_does_not_fit_and_names_the_setting(
    share: float, where: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "MEMORY_SHARE", share)
    path = tmp_path / "recipe.yaml"
    text = HEAD.format(source=tiny["llama"], text=text_file) + "  - {quantize: gptq, group_size: 8}\n"
    path.write_text(text.replace("samples: 2", "samples: 900000000"))
    with pytest.raises(RequestError, match=rf"step quantize needs about .* GB of {where}, .* lower samples or sequence_length"):
        plan(load(path), probe=False)


def test_task_vectors_are_planned_without_sizes(tiny: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    tuned = make_model(tmp_path / "tuned", "llama", seed=1)
    path.write_text(f"source: {tuned}\nsteps: [{{quantize: compeft, base: {tiny['llama']}}}]\n")
    (row,) = plan(load(path), probe=False)["steps"]
    assert row["bytes"] is row["seconds"] is row["peak_memory_bytes"] is None


def test_a_merge_is_planned_by_its_candidates(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    path, adapters = tmp_path / "recipe.yaml", [make_adapter(tmp_path / f"a{i}", tiny["llama"], i) for i in range(3)]
    common = f"source: [{', '.join(map(str, adapters))}], merge: average, rank: 4, base: {tiny['llama']}"
    chosen = f"{common}, validation: [{text_file}], windows: 2, sequence_length: 32"
    steps = f"source: {tiny['llama']}\nsteps:\n  - {{name: plain, {common}}}\n  - {{name: chosen, {chosen}}}\n"
    path.write_text(steps)
    rows = plan(load(path))["steps"]
    assert rows[0]["seconds"] is rows[0]["peak_memory_bytes"] is None
    assert rows[1]["seconds"] >= MergeRequest.fixed_seconds
    assert rows[1]["peak_memory_bytes"] > 0
    options = MergeOptions(validation=("a.txt", "b.txt"), windows=5, sequence_length=32)
    request = MergeRequest(open_model(tiny["llama"]), 3, options)
    assert request.passes() >= 2 * 5 * (7 + 2 * 3)
    assert request.passes() == 2 * MergeRequest(request.model, 3, options.model_copy(update={"validation": ("a.txt",)})).passes()
    path.write_text(steps.replace(f"[{text_file}]", "[self]"))
    with pytest.raises(RequestError, match=r"--validation self: .*cannot judge"):
        plan(load(path), probe=False)


def test_the_command_prints_a_table_or_json(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD.format(source=tiny["llama"], text=text_file) + PATH)
    with pytest.raises(SystemExit) as caught:
        main(["plan", str(path), "--json"])
    assert not caught.value.code
    found = json.loads(capsys.readouterr().out)
    assert all(row["seconds"] >= 0 for row in found["steps"])
    assert found["seconds"] is not None
    shown = table(found)
    assert "compensate eora" in shown
    assert "minutes" in shown
    assert not (tmp_path / "out").exists()
