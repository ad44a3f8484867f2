"""evaluation/run.py: the text and the tasks that a report is about, and its gates. End to end."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compresskit.calibration import builtin_text
from compresskit.errors import RequestError
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate, read_evaluation_text
from compresskit.evaluation.task_files import read_tasks


def test_joined_texts_are_read_whole_and_never_the_part_for_calibration(text_file: Path) -> None:
    text, description = read_evaluation_text(f"{text_file}+builtin")
    builtin, said = read_evaluation_text("builtin")
    assert text == text_file.read_text() + "\n\n" + builtin
    assert description.endswith(said)
    assert builtin_text("calibration") not in text


def test_unknown_tasks_and_folders_are_refused(folder: Path, tiny: dict[str, Path]) -> None:
    with pytest.raises(RequestError, match=r"--tasks chioce: .* Did you mean 'choice'"):
        read_tasks(folder, ["chioce"], None, 0, 0)
    with pytest.raises(RequestError, match="--few-shot 3"):
        read_tasks(folder, ["choice"], None, 3, 0)
    with pytest.raises(RequestError, match=r"pip install 'compresskit\[tasks\]'|no such task"):
        evaluate(str(tiny["llama"]), EvaluateOptions(tasks="no_such_task_anywhere", windows=1, sequence_length=16))


def test_evaluate_reports_tasks_and_gates_see_them(tiny: dict[str, Path], folder: Path) -> None:
    gates = ("tasks.choice>=0", "tasks.words>=1.1")
    options = EvaluateOptions(tasks_folder=str(folder), windows=1, sequence_length=16, gate=gates)
    report = evaluate(str(tiny["llama"]), options)
    assert set(report["tasks"]) == {"choice", "words"}
    assert report["tasks"]["choice"] == report["task_details"]["choice"]["accuracy_normalised"]
    assert [gate["passed"] for gate in report["gates"]] == [True, False]


def test_bits_per_byte_are_the_loss_over_the_bytes_of_the_text(tiny: dict[str, Path], text_file: Path) -> None:
    """The tokenizer of the tiny models has a token for each byte, and the text is of ASCII."""
    options = EvaluateOptions(data=str(text_file), windows=2, sequence_length=16)
    report = evaluate(str(tiny["llama"]), options)
    assert report["bits_per_byte"] == pytest.approx(math.log2(report["perplexity"]))
