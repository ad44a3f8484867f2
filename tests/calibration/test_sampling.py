"""calibration/sampling.py: against a loop without a cache (oracle), its distribution (property), the cache on disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_runs import slow_but
from tiny_models import FAMILIES, make_model
from transformers import AutoModelForCausalLM

from compresskit.calibration import sampling
from compresskit.calibration.sampling import Sampling, batch_size, pick, sample, self_tokens, start_token
from compresskit.errors import NumericalError, RequestError
from compresskit.machine.device import Where
from compresskit.models.load import open_model

HOW = Sampling(0, Where(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", of=FAMILIES))
def test_sampling_with_the_cache_equals_recomputing_everything(family: str, tiny: dict[str, Path]) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float32).eval()
    found = torch.full((5, 24), 1)
    sample(network, found, 3, torch.Generator().manual_seed(7))

    generator = torch.Generator().manual_seed(7)
    for rows in (found[:3], found[3:]):
        expected = torch.full((len(rows), 1), 1)
        for _ in range(23):
            with torch.no_grad():
                probabilities = network(expected, use_cache=False).logits[:, -1].double().softmax(-1)
            uniform = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator)
            chosen = [
                next((i for i, c in enumerate(p.cumsum(0).tolist()) if c > u), 258)
                for p, u in zip(probabilities, uniform[:, 0], strict=True)
            ]
            expected = torch.cat([expected, torch.tensor(chosen)[:, None]], dim=1)
        assert torch.equal(rows, expected)


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=6), st.integers(0, 100))
def test_picks_follow_the_softmax(logits: list[float], seed: int) -> None:
    rows = 4000
    uniform = torch.rand(rows, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    picked = pick(torch.tensor(logits).expand(rows, -1), uniform)
    frequencies = torch.bincount(picked, minlength=len(logits)) / rows
    expected = torch.tensor(logits).softmax(0)
    # Six standard deviations of a frequency.
    assert bool(((frequencies - expected).abs() <= 6 * (expected * (1 - expected) / rows).sqrt() + 1e-3).all())


def test_the_first_tokens_follow_the_models_own_distribution(tiny: dict[str, Path]) -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32).eval()
    tokens = sample(network, torch.full((20_000, 2), 1), 20_000, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network(torch.tensor([[1]])).logits[0, -1].softmax(-1)
    frequencies = torch.bincount(tokens[:, 1], minlength=259) / 20_000
    assert (frequencies - expected).abs().sum() < 2 * (2 / 3.14159 * 259 / 20_000) ** 0.5


def test_a_token_of_probability_zero_is_never_picked() -> None:
    logits = torch.tensor([[-1e9, 0.0, -1e9, 0.0, -1e9]]).expand(3, -1)
    assert pick(logits, torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)).tolist() == [1, 3, 3]


def test_infinite_logits_are_an_error() -> None:
    with pytest.raises(NumericalError, match="NaN or infinity"):
        pick(torch.tensor([[0.0, float("nan")]]), torch.zeros(1, 1, dtype=torch.float64))


def test_the_second_call_takes_the_tokens_from_the_cache(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(tiny["llama"])
    calls: list[tuple[int, int]] = []
    first, description = self_tokens(model, (4, 16), HOW._replace(progress=lambda done, total: calls.append((done, total))))
    assert calls[-1] == (64, 64)
    assert "from token 1" in description

    def load_nothing(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(sampling, "load_stock", load_nothing)
    again, _ = self_tokens(model, (4, 16), HOW)
    assert torch.equal(first, again)
    for shape, how in (
        ((5, 16), HOW),
        ((4, 17), HOW),
        ((4, 16), HOW._replace(seed=1)),
        ((4, 16), HOW._replace(where=Where(torch.device("cpu"), torch.bfloat16))),
    ):
        with pytest.raises(AssertionError, match="loaded again"):
            self_tokens(model, shape, how)


def test_other_weights_and_other_configurations_give_other_text(tiny: dict[str, Path], tmp_path: Path) -> None:
    first, _ = self_tokens(open_model(tiny["llama"]), (4, 16), HOW)
    other, _ = self_tokens(open_model(make_model(tmp_path / "other", "llama", seed=1)), (4, 16), HOW)
    assert not torch.equal(first, other)
    changed = tmp_path / "changed"
    shutil.copytree(tiny["llama"], changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    assert not torch.equal(first, self_tokens(open_model(changed), (4, 16), HOW)[0])


@pytest.mark.parametrize(
    "damage", ["truncated", "other tokens", "other file", "another key's file", "other dtype", "a large file"]
)
def test_a_damaged_cache_file_is_made_again(damage: str, tiny: dict[str, Path], own_cache: Path) -> None:
    model = open_model(tiny["llama"])
    first, _ = self_tokens(model, (4, 16), HOW)
    (file,) = (own_cache / "calibration").iterdir()
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "other tokens":
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    elif damage == "other file":
        save_file({"x": torch.zeros(1)}, file)
    elif damage == "another key's file":
        self_tokens(model, (4, 16), HOW._replace(seed=1))
        (other,) = set((own_cache / "calibration").iterdir()) - {file}
        file.write_bytes(other.read_bytes())
    elif damage == "other dtype":
        save_file({"tokens": first.float(), "sha256": sampling._checksum(first, file.stem)}, file)
    else:
        save_file({"tokens": first, "sha256": sampling._checksum(first, file.stem), "x": torch.zeros(10_000)}, file)
    again, _ = self_tokens(model, (4, 16), HOW)
    assert torch.equal(first, again)
    assert sampling._cached(file, file.stem, (4, 16), 259) is not None


def test_a_checksum_of_another_dtype_is_none(tmp_path: Path) -> None:
    tokens = torch.ones(2, 4, dtype=torch.int64)
    checksum = sampling._checksum(tokens, "key")
    for dtype in (torch.float8_e5m2, torch.float32, torch.int64):
        save_file({"tokens": tokens, "sha256": checksum.to(dtype)}, tmp_path / "file")
        assert sampling._cached(tmp_path / "file", "key", (2, 4), 259) is None


@pytest.mark.parametrize("token", [-1, 259])
def test_a_cached_token_outside_the_vocabulary_is_sampled_again(token: int, tmp_path: Path) -> None:
    tokens = torch.full((2, 4), token)
    save_file({"tokens": tokens, "sha256": sampling._checksum(tokens, "key")}, tmp_path / "file")
    assert sampling._cached(tmp_path / "file", "key", (2, 4), 259) is None


def test_the_start_token_is_the_models_own(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama")
    steps = [({"bos_token_id": 5}, 5), ({"bos_token_id": None, "eos_token_id": [7, 8]}, 7), ({"eos_token_id": None}, 0)]
    (folder / "generation_config.json").unlink()
    for change, expected in steps:
        config = json.loads((folder / "config.json").read_text()) | change
        (folder / "config.json").write_text(json.dumps(config))
        assert start_token(open_model(folder)) == expected
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 9}))
    assert start_token(open_model(folder)) == 9


def test_batches_shrink_as_windows_grow(tiny: dict[str, Path]) -> None:
    config = AutoModelForCausalLM.from_pretrained(tiny["llama"]).config
    sizes = [batch_size(config, length, torch.float32) for length in (10**3, 10**6, 10**9)]
    assert sizes[0] > sizes[1] > sizes[2] == 1


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "free_memory_bytes", lambda: 1000)
    with pytest.raises(RequestError, match="--calibration FILE"):
        self_tokens(open_model(tiny["llama"]), (4, 16), HOW)


def test_free_memory_is_a_plausible_number() -> None:
    assert 10**8 < sampling.free_memory_bytes() < 10**14
