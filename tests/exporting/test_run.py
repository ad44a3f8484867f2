"""exporting/run.py: what stands in OUT, on the streams and in the report. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run
from gguf_files import keys_of

from compresskit.exporting.gguf import writing


def test_the_path_alone_is_printed_and_the_same_request_gives_the_same_bytes(
    tiny: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    for name in ("a.gguf", "b.gguf"):
        assert run("export", "gguf", tiny["llama"], tmp_path / name)[:2] == (0, f"{tmp_path / name}\n")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_the_report_has_the_keys_of_a_stage_and_its_own(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "m.gguf"
    found = json.loads(run("export", "gguf", tiny["llama"], out, "--json")[1])
    assert (found["stage"], found["method"], found["output"], found["source"]) == ("export", "gguf", str(out), str(tiny["llama"]))
    assert found["bytes_after"] == out.stat().st_size
    assert found["parameters_before"] == found["parameters_after"]
    assert (found["tensor_types"], found["bits_per_weight"], found["exact"]) == ({"F32": 30}, 32.0, True)
    assert found["settings"]["weights"] == "auto"
    assert {"seconds", "peak_memory_bytes"} <= found.keys()


def test_the_file_names_what_it_was_made_of(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    assert run("export", "gguf", tiny["llama"], tmp_path / "m.gguf")[0] == 0
    recorded = json.loads(keys_of(tmp_path / "m.gguf")[writing.MANIFEST_KEY])
    assert recorded["stage"] == "export"
    assert len(recorded["inputs"]["sha256"]["model.safetensors"]) == 64


def test_an_older_file_is_replaced_only_if_asked_and_only_if_it_is_one(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    out = tmp_path / "m.gguf"
    out.write_text("a letter")
    assert run("export", "gguf", tiny["llama"], out)[0] == 2
    code, _, err = run("export", "gguf", tiny["llama"], out, "--overwrite")
    assert code == 2
    assert "is no .gguf file, so it is not replaced" in err
    assert out.read_text() == "a letter"
    out.write_bytes(b"GGUF and the rest")
    assert run("export", "gguf", tiny["llama"], out, "--overwrite")[0] == 0
    assert out.stat().st_size > 1000


@pytest.mark.parametrize(("out", "reason"), [
    ("m", "whose name ends with .gguf"), ("m.GGUF", "whose name ends with .gguf"), ("none/m.gguf", "is no folder that can be"),
])  # fmt: skip
def test_an_out_that_cannot_be_one_file_is_refused(
    out: str, reason: str, tiny: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    code, _, err = run("export", "gguf", tiny["llama"], tmp_path / out)
    assert code == 2
    assert reason in err
    assert list(tmp_path.iterdir()) == []


def test_a_changed_weight_file_is_refused(model: Path, tmp_path: Path, run: Run) -> None:
    manifest = {"tool": "compresskit", "outputs": {"sha256": {"model.safetensors": "0" * 64}}}
    (model / "compresskit.json").write_text(json.dumps(manifest))
    assert run("export", "gguf", model, tmp_path / "m.gguf")[0] == 2
    assert run("export", "gguf", model, tmp_path / "m.gguf", "--no-verify")[0] == 0


def test_after_an_error_nothing_is_left(tiny: dict[str, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_announce", full)
    code, _, err = run("export", "gguf", tiny["llama"], tmp_path / "m.gguf")
    assert code == 1
    assert "cannot be written (No space left on device)" in err
    assert list(tmp_path.iterdir()) == []
