"""recovery/selection/shown.py: what `--show` prints is what will be learned, in the text of tests/instruction_corpus.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import SMALL, Run
from instruction_corpus import DROPPED, ROWS, TEMPLATE, lines

SHAPES = ("LLaMA-Factory alpaca with system and history", "other characters", "OpenAI tools")


KEPT = (0, 1, 3)
"""Their rows in the file."""


@pytest.fixture
def asked(tiny: dict[str, Path], tmp_path: Path) -> list[object]:
    """A selection of four rows of different shapes, one of which is no text, for a model with a chat template."""
    model = shutil.copytree(tiny["llama"], tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "d.jsonl").write_bytes(lines(*(ROWS[name][0] for name in SHAPES[:2]), DROPPED["an image"][0], ROWS[SHAPES[2]][0]))
    flags = (
        "--original",
        model,
        "--data",
        tmp_path / "d.jsonl",
        "--select-only",
        "--held-back",
        0,
        *SMALL,
        "--sequence-length",
        256,
    )
    return ["recover", "full", model, tmp_path / "out", *flags]


def test_the_text_that_is_learned_is_printed(asked: list[object], run: Run) -> None:
    code, output, error = run(*asked, "--show", 3)
    assert (code, output.strip()) == (0, str(asked[3]))
    assert error.count("--- d.jsonl row") == 3
    for number, name in zip(KEPT, SHAPES, strict=True):
        before, response = ROWS[name][1]
        response = response.replace("\r", "\\r").replace("\t", "\\t").replace("\u2028", "\\u2028")  # what would move the cursor
        assert f"--- d.jsonl row {number}, before the response:\n{before}\n--- the response:\n{response}\n" in error
    assert "compresskit: note: 1 row left out: not text (first d.jsonl row 2: a turn of 'user' is [{'type': 'image_url'" in error


def test_with_json_it_is_a_key_and_a_finished_selection_can_be_shown(asked: list[object], run: Run) -> None:
    first = run(*asked, "--json", "--quiet", "--show", 9)
    again = run(*asked, "--json", "--quiet", "--show", 9, "--resume")
    for code, output, error in (first, again):
        assert (code, error) == (0, "")
        found = json.loads(output)
        shown = {each["row"]: (each["before"], each["response"]) for each in found["shown"]}
        assert shown == {row: ROWS[name][1] for row, name in zip(KEPT, SHAPES, strict=True)}
        assert found["dropped"]["not text"] == 1
        assert found["dropped_first"]["not text"].startswith("d.jsonl row 2")
    report = json.loads((Path(str(asked[3])) / "recover.json").read_text())
    assert "shown" not in report
