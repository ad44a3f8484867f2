"""evaluation/language_modelling.py: against the stock model's logits, window by window as a user's script would. Oracle tests."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, make_model
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from compresskit.errors import NumericalError, RequestError
from compresskit.evaluation import language_modelling
from compresskit.evaluation.language_modelling import cut_windows, score
from compresskit.evaluation.nuclear_norm import matrix_nuclear_norm
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk import cost

CPU = torch.device("cpu")
FAMILIES = ("llama", "gemma2", "gpt2", "qwen2_moe")


def windows(count: int = 5, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def stock_scores(folder: Path, reference: Path, tokens: torch.Tensor) -> dict[str, float]:
    network, dense = stock(folder), stock(reference)
    loss = dense_loss = kl = same = 0.0
    for window in tokens:
        logits, wanted = network(window[None]).logits[0].float(), dense(window[None]).logits[0].float()
        loss += cross_entropy(logits[:-1], window[1:]).item()
        dense_loss += cross_entropy(wanted[:-1], window[1:]).item()
        kl += kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean().item()
        same += (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item()
    count = len(tokens)
    return {
        "perplexity": math.exp(loss / count),
        "reference_perplexity": math.exp(dense_loss / count),
        "perplexity_ratio": math.exp((loss - dense_loss) / count),
        "kl": kl / count,
        "top1_agreement": same / count,
    }


@torch.inference_mode()
def stock_nuclear_norm(folder: Path, tokens: torch.Tensor) -> float:
    """The last block's output, taken by a hook: `hidden_states[-1]` of the stock model is the final norm's output."""
    network, seen = stock(folder), []
    last = network.get_submodule(open_model(folder).block_name(open_model(folder).block_count - 1))
    last.register_forward_hook(lambda module, inputs, output: seen.append(output[0] if output.dim() == 3 else output))
    for window in tokens:
        network(window[None])
    return sum(matrix_nuclear_norm(hidden) for hidden in seen) / len(seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_the_stock_models(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    changed = make_model(tmp_path / "changed", family, seed=7)
    found = score(open_model(changed), windows(), Where(CPU, torch.float32), open_model(tiny[family]))
    for name, expected in stock_scores(changed, tiny[family], windows()).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-4), name
    assert found.tokens == windows().numel()
    assert found.vocabulary_size == VOCABULARY
    assert found.nuclear_norm == pytest.approx(stock_nuclear_norm(changed, windows()), rel=1e-4)
    assert found.reference_nuclear_norm == pytest.approx(stock_nuclear_norm(tiny[family], windows()), rel=1e-4)


def test_models_of_different_widths_are_compared_in_equal_micro_batches(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = make_model(tmp_path / "wide", "llama", seed=7, hidden_size=64, intermediate_size=288)
    models = open_model(tiny["llama"]), open_model(wide)
    monkeypatch.setattr(cost, "MICRO_BATCH_BYTES", 2 * 40 * 288 * cost.FLOAT32_BYTES)
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 7 * VOCABULARY * language_modelling.FLOAT32_BYTES)
    assert [cost.micro_batch_size(model, 40) for model in models] == [6, 2]
    found = score(models[0], windows(), Where(CPU, torch.float32), models[1])
    for name, expected in stock_scores(tiny["llama"], wide, windows()).items():
        assert getattr(found, name) == pytest.approx(expected, rel=1e-4), name


def test_the_bound_on_logits_changes_no_figure(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny["llama"])
    whole = score(model, windows(), Where(CPU, torch.float32))
    monkeypatch.setattr(language_modelling, "CHUNK_BYTES", 1)
    assert score(model, windows(), Where(CPU, torch.float32)).perplexity == pytest.approx(whole.perplexity, rel=1e-5)


def test_a_model_equals_itself(tiny: dict[str, Path]) -> None:
    model = open_model(tiny["qwen2_moe"])
    found = score(model, windows(), Where(CPU, torch.float32), model)
    assert (found.kl, found.top1_agreement, found.perplexity_ratio) == (0.0, 1.0, 1.0)
    assert found.nuclear_norm == found.reference_nuclear_norm


def test_without_a_reference_nothing_is_compared(tiny: dict[str, Path]) -> None:
    found = score(open_model(tiny["gpt2"]), windows(), Where(CPU, torch.float32))
    compared = ("kl", "top1_agreement", "perplexity_ratio", "reference_perplexity", "reference_nuclear_norm")
    assert all(getattr(found, name) is None for name in compared)


def test_bfloat16_scores_are_close_to_float32(tiny: dict[str, Path]) -> None:
    model = open_model(tiny["llama"])
    exact, rounded = (score(model, windows(), Where(CPU, dtype)).perplexity for dtype in (torch.float32, torch.bfloat16))
    assert rounded == pytest.approx(exact, rel=0.05)


def test_progress_counts_the_blocks_of_both_models(tiny: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    model = open_model(tiny["llama"])
    score(model, windows(), Where(CPU, torch.float32), model, on_block=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(7)]


def test_windows_are_consecutive_and_the_rest_is_dropped() -> None:
    ids = torch.arange(23)
    assert cut_windows(ids, 5, 3).tolist() == [list(range(start, start + 5)) for start in (0, 5, 10)]
    assert cut_windows(ids, 5, 100).shape == (4, 5)


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(RequestError, match="has 4 tokens, at least one window of 5"):
        cut_windows(torch.arange(4), 5, 3)


def test_foreign_tokens_and_impossible_windows_are_refused(tiny: dict[str, Path]) -> None:
    model = open_model(tiny["llama"])
    with pytest.raises(RequestError, match="holds token 259"):
        score(model, windows().fill_(VOCABULARY), Where(CPU, torch.float32))
    for shape in ((0, 8), (3, 1), (8,)):
        with pytest.raises(RequestError, match="shape"):
            score(model, torch.zeros(shape, dtype=torch.int64), Where(CPU, torch.float32))
    with pytest.raises(RequestError, match="exceed its context of 256"):
        score(model, windows(1, 257), Where(CPU, torch.float32))


@pytest.mark.parametrize("loss", [math.nan, math.inf, 701.0])
def test_a_loss_without_a_perplexity_is_an_error(loss: float, tiny: dict[str, Path]) -> None:
    with pytest.raises(NumericalError, match="mean loss"):
        language_modelling._perplexity(open_model(tiny["llama"]), loss)
