"""archiving/run.py: pack, inspect and expand on the command line, and as a step of a recipe. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from archive_files import content, small_folder
from conftest import Run

import compresskit
from compresskit.recipe.reading import load
from compresskit.recipe.run import run as run_recipe


def test_a_folder_is_packed_shown_and_expanded_bit_by_bit(tmp_path: Path, run: Run) -> None:
    source, out = small_folder(tmp_path / "source"), tmp_path / "a.ckz"
    found = json.loads(run("pack", source, out, "--json")[1])
    size = sum(map(len, content(source).values()))
    assert (found["stage"], found["output"], found["source"]) == ("pack", str(out), str(source))
    assert (found["bytes_before"], found["bytes_after"]) == (size, out.stat().st_size)
    assert {"seconds", "peak_memory_bytes", "settings", "kinds", "ratio"} <= found.keys()
    shown = json.loads(run("inspect", out, "--json")[1])
    assert (shown["kind"], shown["digest"], shown["folder_bytes"]) == ("archive", found["digest"], size)
    listing = run("inspect", out)[1]
    assert "codes with zero points" in listing
    assert "file             adapter/adapter_model.safetensors" in listing
    code, printed, said = run("expand", out, tmp_path / "again")
    assert (code, printed) == (0, f"{tmp_path / 'again'}\n")
    assert said.startswith("expand: ")
    assert content(tmp_path / "again") == content(source)


def test_an_older_archive_is_replaced_only_if_asked_and_only_if_it_is_one(tmp_path: Path, run: Run) -> None:
    source, out = small_folder(tmp_path / "source"), tmp_path / "a.ckz"
    assert run("pack", source, out)[0] == 0
    before = out.read_bytes()
    assert run("pack", source, out)[0] == 2
    assert run("pack", source, out, "--overwrite", "--threads", 2)[0] == 0
    assert out.read_bytes() == before
    out.write_text("a letter")
    code, _, said = run("pack", source, out, "--overwrite")
    assert code == 2
    assert "is no .ckz file" in said


@pytest.mark.parametrize(("flags", "reason"), [
    (["--base", "b"], "leave out --base"), (["--max-shard-size", "1GB"], "leave out --max-shard-size"),
    (["--threads", "-1"], "--threads -1"),
])  # fmt: skip
def test_what_an_archive_does_not_take_is_refused(flags: list[str], reason: str, tmp_path: Path, run: Run) -> None:
    assert run("pack", small_folder(tmp_path / "source"), tmp_path / "a.ckz")[0] == 0
    code, _, said = run("expand", tmp_path / "a.ckz", tmp_path / "out", *flags)
    assert code == 2
    assert reason in said


def test_a_file_that_is_no_archive_and_an_archive_that_is_no_folder_are_told_apart(tmp_path: Path, run: Run) -> None:
    assert run("pack", small_folder(tmp_path / "source"), tmp_path / "a.ckz")[0] == 0
    code, _, said = run("evaluate", tmp_path / "a.ckz")
    assert code == 2
    assert "compresskit expand makes one of a .ckz file" in said
    for command in (
        ("expand", tmp_path / "source" / "config.json", tmp_path / "out"),
        ("inspect", tmp_path / "source" / "config.json"),
    ):
        code, _, said = run(*command)
        assert code == 2
        assert "begins as no .ckz archive does" in said


def test_a_changed_weight_file_is_refused(tmp_path: Path, run: Run) -> None:
    source = small_folder(tmp_path / "source")
    manifest = {"tool": "compresskit", "outputs": {"sha256": {"model.safetensors": "0" * 64}}}
    (source / "compresskit.json").write_text(json.dumps(manifest))
    assert run("pack", source, tmp_path / "m.ckz")[0] == 2
    assert not (tmp_path / "m.ckz").exists()
    assert run("pack", source, tmp_path / "m.ckz", "--no-verify")[0] == 0


def test_expanding_in_place_of_a_folder_of_ours_replaces_it(tmp_path: Path, run: Run) -> None:
    source = small_folder(tmp_path / "source")
    (source / "compresskit.json").write_text(json.dumps({"tool": "compresskit"}))
    wanted = content(source)
    assert run("pack", source, tmp_path / "m.ckz")[0] == 0
    (source / "config.json").unlink()
    assert run("expand", tmp_path / "m.ckz", source)[0] == 2
    assert run("expand", tmp_path / "m.ckz", source, "--overwrite")[0] == 0
    assert content(source) == wanted


def test_the_functions_do_what_the_commands_do(tmp_path: Path) -> None:
    source = small_folder(tmp_path / "source")
    assert compresskit.pack(source, tmp_path / "a.ckz", quiet=True)["files"] == 5
    assert compresskit.expand(tmp_path / "a.ckz", tmp_path / "out", quiet=True)["files"] == 5
    assert content(tmp_path / "out") == content(source)


def test_a_step_of_a_recipe_writes_one_file_that_counts_as_done_while_it_is_there(tmp_path: Path) -> None:
    small_folder(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(f"source: {tmp_path / 'model'}\nsteps:\n  - pack:\n    threads: 1\n")
    recipe, file = load(tmp_path / "recipe.yaml"), tmp_path / "out" / "pack" / "pack.ckz"
    assert run_recipe(recipe, tmp_path / "out")["steps"]["pack"]["output"] == str(file)
    before = file.read_bytes()
    assert run_recipe(recipe, tmp_path / "out")["ran"] == []
    file.unlink()
    assert run_recipe(recipe, tmp_path / "out")["ran"] == ["pack"]
    assert file.read_bytes() == before
