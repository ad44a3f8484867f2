"""evaluation/tasks.py: scores equal those of transformers, one row at a time, without padding. Oracle tests."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.errors import CheckpointError
from compresskit.evaluation.task_files import Row, Task, read_tasks
from compresskit.evaluation.tasks import encoder, likelihoods, lm_eval_scores, score_tasks
from compresskit.machine.device import Where
from compresskit.models.load import open_model

WHERE = Where(torch.device("cpu"), torch.float32)


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


def test_tokens_beyond_the_vocabulary_are_refused(model: Path, folder: Path) -> None:
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["e"] = 300
    (model / "tokenizer.json").write_text(json.dumps(content))
    tasks = read_tasks(folder, ["words"], None, 0, 0)
    with pytest.raises(CheckpointError, match=f"{model}: its tokenizer gives token 300, the model knows 259"):
        score_tasks(open_model(model), tasks, WHERE, lambda done, total: None)


def test_tokens_beyond_the_vocabulary_are_named_where_lm_eval_runs_the_model(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for lm-eval, which asks the network for the logits of a text."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["e"] = 300
    (model / "tokenizer.json").write_text(json.dumps(content))
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def simple_evaluate(**_: object) -> None:
        network(torch.tensor([tokenizer("three").input_ids]))

    manager = SimpleNamespace(all_tasks=["piqa"])
    stand_in = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **_: None},
        "lm_eval.tasks": {"TaskManager": lambda: manager},
    }
    for name, content in stand_in.items():
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**content))
    with pytest.raises(CheckpointError, match=f"{model}: its tokenizer gives tokens up to 300, the model knows 259"):
        lm_eval_scores(network, tokenizer, ["piqa"], None, 0)
