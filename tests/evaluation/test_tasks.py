"""Task scores equal those of transformers, one row at a time, without padding. Oracle, and end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.errors import RequestError
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.evaluation.task_files import Row, Task, read_tasks
from compresskit.evaluation.tasks import encoder, likelihoods, score_tasks
from compresskit.machine.device import Where
from compresskit.models.load import open_model

WHERE = Where(torch.device("cpu"), torch.float32)
QUESTIONS = [
    {"question": "Question: two and two\nAnswer:", "choices": ["four", "five apples", "a"], "answer": 0},
    {"question": "The fox jumps over", "choices": ["the dog", "it"], "answer": 1},
    {"question": "A", "choices": ["rather long continuation of a very short question", "b", "c"], "answer": 2},
]
TEXTS = [{"text": "the quick brown fox"}, {"text": "one two three two one "}, {"text": "a b"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("choice", QUESTIONS), ("words", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def reference(model: Path, prompt: str, continuation: str) -> tuple[float, bool]:
    """By the stock model, token after token."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    context = tokenizer(prompt, add_special_tokens=False).input_ids
    total, greedy = 0.0, True
    for token in tokenizer(continuation, add_special_tokens=False).input_ids:  # byte tokens never merge
        with torch.no_grad():
            chances = network(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        total += float(chances[token])
        greedy = greedy and int(chances.argmax()) == token
        context = [*context, token]
    return total, greedy


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_padded_batches_say_what_single_rows_say(family: str, tiny: dict[str, Path], folder: Path) -> None:
    model = open_model(tiny[family])
    encode = encoder(tiny[family], False)
    pairs = [(row.prompt, text) for task in read_tasks(folder, ["choice", "words"], None, 0, 0) for row in task.rows
             for text in row.continuations]  # fmt: skip
    found = likelihoods(model, [encode(*pair) for pair in pairs], WHERE, lambda done, total: None)
    for pair, each in zip(pairs, found, strict=True):
        total, greedy = reference(tiny[family], *pair)
        assert each.log_probability == pytest.approx(total, abs=2e-3)
        assert each.likeliest == greedy


def test_accuracies_are_counted_as_defined(tiny: dict[str, Path], folder: Path) -> None:
    tasks = read_tasks(folder, ["choice", "words"], None, 0, 0)
    found = score_tasks(open_model(tiny["llama"]), tasks, WHERE, lambda done, total: None)
    plain, normalised = 0, 0
    for row in tasks[0].rows:
        sums = [reference(tiny["llama"], row.prompt, text)[0] for text in row.continuations]
        rates = [value / len(text.strip()) for value, text in zip(sums, row.continuations, strict=True)]
        plain += sums.index(max(sums)) == row.answer
        normalised += rates.index(max(rates)) == row.answer
    assert found["choice"]["accuracy"] == pytest.approx(plain / 3)
    assert found["choice"]["accuracy_normalised"] == pytest.approx(normalised / 3)
    assert found["words"]["rows"] == 3
    assert "accuracy_normalised" not in found["words"]


def test_a_prompt_longer_than_the_context_keeps_its_end(tiny: dict[str, Path]) -> None:
    row = Row("x " * 400, (" yes", " no"), 0, (3, 2))
    found = score_tasks(open_model(tiny["llama"]), [Task("long", [row], True)], WHERE, lambda done, total: None)
    assert found["long"]["rows"] == 1


def test_limit_and_shots_shape_the_rows(folder: Path) -> None:
    (task,) = read_tasks(folder, ["choice"], 1, 2, 0)
    assert len(task.rows) == 1
    assert task.rows[0].prompt.endswith("\n\nQuestion: two and two\nAnswer:")
    assert "The fox jumps over it" in task.rows[0].prompt
    assert read_tasks(folder, ["choice"], 1, 2, 0) == [task]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "needs a question"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is not the index"),
        ('{"text": "word"}', "two words"),
    ],
)
def test_a_malformed_row_is_refused_by_file_and_line(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + line + "\n")
    with pytest.raises(RequestError, match=rf"bad\.jsonl:2: .*{words}"):
        read_tasks(tmp_path, ["bad"], None, 0, 0)


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
