"""recovery/data/reading.py: data that a model cannot take is refused in one line, before any work. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run

GOOD = json.dumps({"instruction": "Add 1 and 2.", "output": "It is three."}) + "\n"
FLAGS = ("--select-only", "--sequence-length", 256, "--held-back", 0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD)
    return path


def test_tokens_beyond_the_vocabulary_are_refused(model: Path, data: Path, run: Run) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["e"] = 300
    (model / "tokenizer.json").write_text(json.dumps(content))
    code, _, error = run("recover", "full", model, model.parent / "out", "--original", model, "--data", data, *FLAGS)
    assert code == 2
    assert (
        error == f"compresskit: error: {model}: its tokenizer gives token 300, the model knows 259; restore its own tokenizer\n"
    )


@pytest.mark.parametrize("row", ['{"a":' * 100_000 + "1" + "}" * 100_000, "[" * 100_000 + "]" * 100_000])
def test_rows_without_bottom_are_one_line(row: str, model: Path, data: Path, run: Run) -> None:
    data.write_text(GOOD + row + "\n")
    code, _, error = run("recover", "full", model, model.parent / "out", "--original", model, "--data", data, *FLAGS)
    assert code == 2
    assert error.startswith(
        f"compresskit: error: {data}: line 2 is not JSON (nested more than 200 levels deep); mend or remove it"
    )
    assert len(error.splitlines()) == 1


def test_a_row_with_half_of_a_character_does_not_end_the_run(model: Path, data: Path, run: Run) -> None:
    """What json.dumps writes of such a text; no tokenizer takes it."""
    other = json.dumps({"instruction": "Say \ud83d.", "output": "no"}) + "\n"
    data.write_text(GOOD + other + json.dumps({"instruction": "Count.", "output": "one \U0001f600", "note": "\ud83d"}) + "\n")
    out = model.parent / "out"
    code, text, error = run("recover", "full", model, out, "--original", model, "--data", data, *FLAGS, "--json")
    assert code == 0, error
    found = json.loads(text)
    assert (found["selected"], found["dropped"]["half of a surrogate pair"]) == (2, 1)
    assert "compresskit: note: 1 row left out: half of a surrogate pair (first d.jsonl row 1)" in error
