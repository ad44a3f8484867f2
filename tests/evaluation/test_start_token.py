"""evaluation/start_token.py: against transformers on windows that begin with the start token (oracle)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.errors import RequestError
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.evaluation.start_token import first_token

LENGTH = 16


@pytest.fixture
def starting(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny llama whose tokenizer puts <s> before a text."""
    folder = shutil.copytree(tiny["llama"], tmp_path / "starting")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def stock_perplexity(folder: Path, text: str, windows: int) -> float:
    """Each window begins with the start token; transformers alone."""
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False).input_ids
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    losses = []
    for number in range(windows):
        part = ids[number * (LENGTH - 1) : (number + 1) * (LENGTH - 1)]
        with torch.no_grad():
            window = torch.tensor([[1, *part]])
            losses.append(float(network(window, labels=window).loss))
    return float(torch.tensor(losses).double().mean().exp())


def test_every_window_begins_as_the_tokenizer_begins_a_text(starting: Path, text_file: Path) -> None:
    options = EvaluateOptions(data=str(text_file), windows=3, sequence_length=LENGTH)
    report = evaluate(str(starting), options)
    assert report["perplexity"] == pytest.approx(stock_perplexity(starting, text_file.read_text(), 3), rel=1e-4)
    assert report["text"].endswith("3 windows of 16 tokens, each after the start token 1")
    assert report["tokens"] == 3 * LENGTH


def test_it_can_be_asked_for_and_left_out(starting: Path, tiny: dict[str, Path]) -> None:
    assert first_token(starting, "auto") == 1 and first_token(starting, "never") is None
    assert first_token(tiny["llama"], "auto") is None and first_token(tiny["llama"], "always") == 1


def test_without_a_start_token_nothing_is_said_of_one(tiny: dict[str, Path], text_file: Path) -> None:
    texts = [
        evaluate(str(tiny["llama"]), EvaluateOptions(data=str(text_file), windows=2, sequence_length=LENGTH, bos=bos))
        for bos in ("auto", "never")
    ]
    assert texts[0]["perplexity"] == texts[1]["perplexity"] and "start token" not in texts[0]["text"]


def test_a_tokenizer_that_names_none_refuses_always(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(tiny["llama"], tmp_path / "nameless")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RequestError, match=r"--bos always: .* names no start token"):
        first_token(folder, "always")
