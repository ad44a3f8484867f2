"""evaluation/generations.py, evaluation/request.py and evaluation/run.py: answers before and after.

Oracle: passes over the whole text, without a cache, one row at a time.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import slow_but
from tiny_models import FAMILIES, make_model

from compresskit.errors import CheckpointError, NumericalError, RequestError
from compresskit.evaluation import generations as module
from compresskit.evaluation.generations import ask, end_tokens, generations, greedy
from compresskit.evaluation.prompts import ANSWER_TOKENS, PROMPTS
from compresskit.evaluation.request import EvaluateOptions, EvaluateRequest
from compresskit.evaluation.run import evaluate
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.models.ragged import load_stock
from compresskit.models.tokenizer import open_tokenizer

CPU = Where(torch.device("cpu"), torch.float32)
TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


@torch.inference_mode()
def most_likely(network: Any, tokens: list[int], count: int) -> list[int]:
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(network(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[-count:]


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=FAMILIES))
def test_every_row_is_continued_by_its_most_likely_tokens(family: str, tiny: dict[str, Path]) -> None:
    network = load_stock(open_model(tiny[family]), CPU)
    prompts = torch.randint(3, 259, (3, 20), generator=torch.Generator().manual_seed(0))
    expected = [most_likely(network, row, 8) for row in prompts.tolist()]
    assert greedy(network, prompts, 8, set()) == expected
    ends = {expected[0][3], 10**6}
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in expected]
    assert greedy(network, prompts, 8, ends) == cut


def test_the_answers_are_the_most_likely_tokens_whatever_the_folder_says_of_sampling(
    tiny: dict[str, Path], tmp_path: Path
) -> None:
    other = make_model(tmp_path / "other", "llama", seed=1)
    sampling = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 9.0, "max_length": 3, "eos_token_id": 2}
    (other / "generation_config.json").write_text(json.dumps(sampling))
    models = [open_model(tiny["llama"]), open_model(other)]
    asked = ask(models, 3, CPU)
    found = generations(models, asked, CPU)
    assert [each["prompt"] for each in found] == list(PROMPTS[:3])
    for model, key in zip(models, ("after", "before"), strict=True):
        network, tokenizer = load_stock(model, CPU), open_tokenizer(model.checkpoint.folder)
        for each in found:
            tokens = tokenizer(f"Question: {each['prompt']}\nAnswer:").input_ids
            made = most_likely(network, tokens, ANSWER_TOKENS)
            made = made[: made.index(2)] if 2 in made else made
            assert tokenizer.decode(made, skip_special_tokens=True).strip() == each[key]
    assert any(each["before"] != each["after"] for each in found)
    assert generations(models, asked, CPU) == found


def test_a_model_that_computes_no_numbers_is_refused(tiny: dict[str, Path]) -> None:
    network = load_stock(open_model(tiny["llama"]), CPU)
    with torch.no_grad():
        network.get_output_embeddings().weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="logits hold NaN"):
        greedy(network, torch.tensor([[5, 6]]), 3, {2})


def test_a_chat_template_is_put_around_the_questions(model: Path) -> None:
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    asked = ask([open_model(model)], 2, CPU)
    assert [asked.tokenizer.decode(tokens) for tokens in asked.tokens] == [f"<user>{prompt}<me>" for prompt in PROMPTS[:2]]


def test_answers_end_where_the_configuration_or_the_tokenizer_says(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    opened = open_model(model)
    assert end_tokens(load_stock(opened, CPU), open_tokenizer(model)) == {2, 7, 9}


def test_what_cannot_be_asked_is_refused_before_the_work(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    short = open_model(make_model(tmp_path / "short", "llama", max_position_embeddings=80))
    assert 0 < ask([short], 1, CPU).answer_tokens < ANSWER_TOKENS
    with pytest.raises(RequestError, match=r"its context is 80; leave --generations out"):
        ask([short], 20, CPU)
    with monkeypatch.context() as patch, pytest.raises(RequestError, match=r"--generations loads whole models"):
        patch.setattr(module, "MEMORY_MARGIN", 1e12)
        ask([open_model(model)], 1, CPU)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ '' }}"}))
    with pytest.raises(CheckpointError, match="chat template makes nothing of a question"):
        ask([open_model(model)], 1, CPU)
    (model / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        ask([open_model(model)], 1, CPU)


def test_evaluate_reports_the_answers_of_both(tiny: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(tiny["llama"], tmp_path / "copy")
    options = EvaluateOptions(windows=1, sequence_length=16, generations=2)
    alone = evaluate(str(copy), options)["generations"]
    both = evaluate(str(copy), options.model_copy(update={"against": str(tiny["llama"])}))["generations"]
    assert [each["before"] for each in alone] == [None, None]
    assert [each["before"] for each in both] == [each["after"] for each in both] == [each["after"] for each in alone]
    assert evaluate(str(copy), options.model_copy(update={"generations": 0}))["generations"] is None


def test_a_plan_counts_the_answers_and_the_model_that_gives_them(tiny: dict[str, Path]) -> None:
    opened = open_model(tiny["llama"])
    without, with_answers = (EvaluateRequest(opened, None, EvaluateOptions(generations=count)) for count in (0, 20))
    assert with_answers.passes() > without.passes()
    assert with_answers.peak_bytes() >= max(without.peak_bytes(), 4 * opened.parameters)
