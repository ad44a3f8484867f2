"""job.py: a stage is held by one process, finds what is finished, and reads only what is as it was written. End to end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from conftest import SMALL, Run

from compresskit.checkpoint.folder import held
from compresskit.checkpoint.reader import sha256

ROUND = ("--sparsity", "0.25", "--round-to", "8")


def test_a_stage_that_had_finished_gives_its_result_again_with_resume(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ("prune", "cfsp", tiny["llama"], out, *ROUND, "--calibration", text_file, *SMALL)
    code, first, _ = run(*arguments, "--json")
    assert code == 0
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    code, second, err = run(*arguments, "--json", "--resume")
    assert code == 0
    assert "had finished already" in err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    found, expected = json.loads(second), json.loads(first)
    assert {key: found[key] for key in expected if key not in ("seconds", "peak_memory_bytes")} == {
        key: value for key, value in expected.items() if key not in ("seconds", "peak_memory_bytes")
    }


def test_an_out_of_another_request_is_not_taken_for_this_one_s(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    text = ("--calibration", text_file, *SMALL)
    more = ("--sparsity", "0.5", "--round-to", "8", *text, "--resume")
    assert run("prune", "cfsp", tiny["llama"], out, *ROUND, *text)[0] == 0
    before = sha256(out / "model.safetensors")
    code, _, err = run("prune", "cfsp", tiny["llama"], out, *more)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{out}: exists already, made by another request" in err
    assert sha256(out / "model.safetensors") == before
    assert run("prune", "cfsp", tiny["llama"], out, *more, "--overwrite")[0] == 0
    assert sha256(out / "model.safetensors") != before
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize(
    "stage",
    [
        ("prune", "cfsp", "{model}", "{out}"), ("quantize", "rtn", "{model}", "{out}", "--group-size", "8"),
        ("recover", "random", "{model}", "{out}", "--original", "{model}", "--data", "{data}", "--sequence-length", "256"),
        ("quantize", "compeft", "{adapter}", "{out}"), ("merge", "average", "{adapter}", "{adapter}", "{out}"),
    ],
    ids=lambda stage: stage[0] + " " + stage[1],
)  # fmt: skip
def test_every_stage_refuses_an_out_in_which_another_process_is_at_work(
    stage: tuple[str, ...], run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    from tiny_models import make_adapter

    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"instruction": f"say {i}", "output": str(i) * 5}) + "\n" for i in range(8)))
    adapter = make_adapter(tmp_path / "adapter", tiny["llama"], 1)
    names = {"model": tiny["llama"], "out": out, "data": data, "adapter": adapter}
    text = ("--calibration", text_file, *SMALL) if stage[1] in ("cfsp", "rtn") else ()
    with held(out, overwrite=False):
        code, _, err = run(*(each.format(**names) for each in stage), *text)
    assert (code, err.count("\n")) == (2, 1), err
    assert f"{out}: process {os.getpid()} on " in err
    assert not out.exists()


def test_a_link_out_of_the_source_is_refused_before_the_work(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    code, _, err = run("prune", "cfsp", model, tmp_path / "out", *ROUND, "--calibration", text_file, *SMALL)
    assert (code, err.count("\n")) == (2, 1)
    assert f"{model / 'LICENSE'}: is a link to" in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
