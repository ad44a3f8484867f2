"""What a plan says is what then happens. End to end on tiny models; bytes exactly, where nothing depends on the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from compresskit.cli.main import main
from compresskit.errors import RequestError
from compresskit.recipe.plan import plan, table
from compresskit.recipe.reading import load
from compresskit.recipe.run import run
from compresskit.recovery.request import RecoverRequest

HEAD = "source: {source}\ndefaults: {{calibration: {text}, samples: 8, sequence_length: 64}}\nsteps:\n"
EVALUATE = "  - {{evaluate: , against: source, data: {text}, windows: 2}}\n"
PATHS = {
    "uniform, 4 bits, repair": (
        "  - {{prune: cfsp, sparsity: 0.25, round_to: 8, allocation: uniform}}\n"
        "  - {{quantize: gptq, bits: 4, group_size: 8}}\n"
        "  - {{compensate: eora, original: prune, rank: 2, adapter_bits: 8}}\n" + EVALUATE
    ),
    "an adapter of its own, then a repair": (
        "  - {{quantize: apiq, bits: 3, group_size: 8, epochs: 1, rank: 2}}\n"
        "  - {{compensate: eora, original: source, rank: 2}}\n" + EVALUATE
    ),
    "16-bit embedding": "  - {{quantize: rtn, bits: 2, group_size: 8, embedding_bits: 16}}\n" + EVALUATE,
    "merged": "  - {{quantize: rtn, bits: 4, group_size: 8}}\n  - {{compensate: svd, original: source, rank: 1, merge: true}}\n",
    "bitsandbytes": "  - {{quantize: nf4}}\n",
}  # fmt: skip


@pytest.mark.parametrize("case", PATHS)
def test_planned_bytes_are_the_bytes_of_the_run(case: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((HEAD + PATHS[case]).format(source=tiny["llama"], text=text_file))
    planned = {row["step"]: row for row in plan(load(path), probe=False)["steps"]}
    result = run(load(path), tmp_path / "out")
    for name, step in result["steps"].items():
        if step["stage"] == "evaluate":
            assert planned[name]["bytes"] == pytest.approx(step["bytes"], rel=0.01)
            assert planned[name]["parameters"] == step["parameters"]
        else:
            files = sum(file.stat().st_size for file in (tmp_path / "out" / name).rglob("*.safetensors"))
            assert planned[name]["disk_bytes"] == pytest.approx(files, rel=0.01)


def test_planned_bytes_of_allocated_widths_are_close(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((HEAD + "  - {{prune: cfsp, sparsity: 0.3, round_to: 1}}\n").format(source=tiny["llama"], text=text_file))
    (row,) = plan(load(path), probe=False)["steps"]
    result = run(load(path), tmp_path / "out")
    assert row["bytes"] == pytest.approx(result["steps"]["prune"]["bytes_after"], rel=0.01)


def test_a_longer_fine_tuning_is_planned_longer(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"instruction": "say", "input": "", "output": "something"}\n' * 20)
    common = "recover: full, original: source, data: '${{here}}/data.jsonl', self_samples: 4"
    lines = "".join(
        f"  - {{{{name: {name}, source: prune, {common}, {setting}}}}}\n"
        for name, setting in (
            ("once", "epochs: 1"),
            ("often", "epochs: 50"),
            ("steps", "steps: 500"),
            ("selection", "select_only: true"),
        )
    )
    path = tmp_path / "recipe.yaml"
    path.write_text((HEAD + "  - {{prune: cfsp, round_to: 8}}\n" + lines).format(source=tiny["llama"], text=text_file))
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
        path.write_text((HEAD + PATHS["uniform, 4 bits, repair"]).format(source=source, text=text_file))
        rows.append(plan(load(path), probe=False)["steps"])
    for bare_row, row in zip(*rows, strict=True):
        assert bare_row["parameters"] == row["parameters"]
        assert bare_row["bytes"] == pytest.approx(row["bytes"], rel=0.001)  # the order of tensors moves the headers a little


def test_a_plan_refuses_what_the_stage_would(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        (HEAD + "  - {{prune: cfsp, sparsity: 0.25, round_to: 4}}\n  - {{quantize: rtn, group_size: 32}}\n").format(
            source=tiny["llama"], text=text_file
        )
    )
    with pytest.raises(RequestError, match=r"--group-size 32: .* do not divide"):
        plan(load(path), probe=False)


def test_a_plan_refuses_what_does_not_fit_and_names_the_setting(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    text = (HEAD + "  - {{quantize: gptq, group_size: 8}}\n").format(source=tiny["llama"], text=text_file)
    path.write_text(text.replace("samples: 8", "samples: 900000000"))
    with pytest.raises(RequestError, match=r"step quantize needs about .* GB of memory, .* lower samples or sequence_length"):
        plan(load(path), probe=False)


def test_the_command_prints_a_table_or_json(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text((HEAD + PATHS["uniform, 4 bits, repair"]).format(source=tiny["llama"], text=text_file))
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
