"""evaluation/scores.py: when a model counts as collapsed and which models may be compared. Property tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from compresskit.errors import RequestError
from compresskit.evaluation.scores import Scores, check_comparable, collapse_warning, context_length
from compresskit.models.load import open_model

HEALTHY = Scores(perplexity=20.0, tokens=1000, nuclear_norm=0.5, vocabulary_size=49152)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"perplexity": 50000.0}, "uniform guess over 49152 tokens"),
        ({"perplexity_ratio": 10.5}, "10.5 times the original's"),
        ({"perplexity_ratio": 2.0, "kl": 4.4}, "4.4 nats a token"),
        ({"perplexity_ratio": 2.0, "top1_agreement": 0.05}, "5.0% of its top-1 tokens"),
    ],
)
def test_a_collapsed_model_is_named_in_one_sentence(changes: dict[str, float], words: str) -> None:
    warning = collapse_warning(HEALTHY.model_copy(update=changes))
    assert warning is not None
    assert words in warning
    assert "\n" not in warning


USABLE: tuple[dict[str, float], ...] = (
    {},
    {"perplexity_ratio": 2.4, "top1_agreement": 0.5, "kl": 1.2},
    {"perplexity_ratio": 10.0},
    {"perplexity": 50000.0, "reference_perplexity": 50001.0, "perplexity_ratio": 1.0},
    {"perplexity": 50000.0, "reference_perplexity": 50001.0, "perplexity_ratio": 1.0, "top1_agreement": 0.05},
)


@pytest.mark.parametrize("changes", USABLE)
def test_a_usable_model_gets_no_warning(changes: dict[str, float]) -> None:
    assert collapse_warning(HEALTHY.model_copy(update=changes)) is None


def test_models_with_different_vocabularies_are_not_compared(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(tiny["llama"])
    check_comparable(model, open_model(tiny["gpt2"]))
    network = AutoModelForCausalLM.from_pretrained(tiny["gpt2"])
    network.resize_token_embeddings(300, mean_resizing=False)
    network.save_pretrained(tmp_path / "other")
    with pytest.raises(RequestError, match=r"llama has a vocabulary of 259 tokens, .*other of 300"):
        check_comparable(model, open_model(tmp_path / "other"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_the_context_is_found_under_every_familys_key(family: str, tiny: dict[str, Path]) -> None:
    assert context_length(open_model(tiny[family])) == 256


def test_checks_and_gates_load_no_torch() -> None:
    code = "import sys, compresskit.evaluation.scores, compresskit.evaluation.gates; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
