"""task_vectors/merge.py, task_vectors/compress.py, task_vectors/expand.py: adapters of peft's whole space of configurations.

Property: whatever is accepted equals stock peft's own change of the weights; everything else is refused in one line.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_space
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_model

from compresskit.errors import RequestError
from compresskit.task_vectors.compeft import ComPEFT
from compresskit.task_vectors.compress import compress
from compresskit.task_vectors.expand import expand
from compresskit.task_vectors.merge import merge
from compresskit.task_vectors.merging.average import Average
from compresskit.task_vectors.request import ExpandOptions, MergeOptions, TernaryOptions

Change = dict[str, torch.Tensor]
EPSILON = {torch.float32: 1e-5, torch.float16: 2**-8, torch.bfloat16: 2**-5}
"""A few roundings of the dtype of the result, which is that of the first source."""
RANK = 16
"""At least twice the sum of two drawn ranks: factors that start from the base have rank 2 r."""
SMALL = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 40, "num_attention_heads": 2, "num_key_value_heads": 2}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # raised inside peft
]
SOMETHING = st.one_of(peft_space.PLAIN, peft_space.anything())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", peft_space.FAMILY, **peft_space.SIZES | SMALL)


def made(root: Path, base: Path, drawn: list[dict[str, Any]]) -> list[Path]:
    found = [peft_space.make(root / f"source {number}", base, each, number) for number, each in enumerate(drawn)]
    return [each for each in found if each is not None]


def accepted(action: Callable[[], object], folders: list[Path]) -> bool:
    """Whether a request was accepted; a refusal names one of the sources in one line."""
    try:
        action()
    except RequestError as error:
        assert "\n" not in str(error)
        assert any(str(folder) in str(error) for folder in folders) or "--rank" in str(error), error
        return False
    return True


def assert_close(found: Change, expected: Change, epsilon: float, context: object) -> None:
    for name in found.keys() | expected.keys():
        zero = torch.zeros_like(found.get(name, expected.get(name, torch.zeros(0))))
        pair = found.get(name, zero), expected.get(name, zero)
        size = float(max(each.abs().max() for each in pair))
        assert float((pair[0] - pair[1]).abs().max()) <= epsilon * (1 + size), (name, context)


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(SOMETHING, SOMETHING)
def test_merging_at_a_rank_averages_what_stock_peft_makes_of_two_adapters(
    base: Path, first: dict[str, Any], second: dict[str, Any]
) -> None:
    with tempfile.TemporaryDirectory() as root:
        sources, out = made(Path(root), base, [first, second]), Path(root, "merged")
        if len(sources) < 2:
            return
        options = MergeOptions(rank=RANK)
        if not accepted(lambda: merge(Average(), [str(each) for each in sources], out, options), sources):
            assert not all(is_plain(each) for each in (first, second))
            return
        changes = [peft_space.stock_change(each, base) for each in sources]
        zero = {name: torch.zeros_like(change) for each in changes for name, change in each.items()}
        expected = {name: (changes[0].get(name, none) + changes[1].get(name, none)) / 2 for name, none in zero.items()}
        assert_close(peft_space.stock_change(out, base), expected, EPSILON[first["dtype"]], (first, second))


def is_plain(drawn: dict[str, Any]) -> bool:
    """Whether an adapter must be accepted."""
    more = drawn.keys() & {"use_dora", "bias", "modules_to_save", "lora_bias", "trainable_token_indices"}
    known = drawn["init_lora_weights"] not in peft_space.UNKNOWN_CHANGE
    return not more and known and drawn["style"] in peft_space.LOADED_STYLES and drawn["target_modules"] in peft_space.TARGETS


@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(SOMETHING, st.sampled_from([1, 16]))
def test_merging_an_adapter_with_itself_gives_what_stock_peft_makes_of_it(base: Path, drawn: dict[str, Any], alpha: int) -> None:
    """Entry by entry, and once with another alpha."""
    with tempfile.TemporaryDirectory() as root:
        other = drawn | {"lora_alpha": alpha, "alpha_pattern": {}}
        sources, out = made(Path(root), base, [drawn, other]), Path(root, "merged")
        if len(sources) < 2:
            return
        (sources[1] / peft_space.WEIGHTS).write_bytes((sources[0] / peft_space.WEIGHTS).read_bytes())
        if not accepted(lambda: merge(Average(), [str(each) for each in sources], out, MergeOptions()), sources):
            assert not is_plain(drawn) or drawn["init_lora_weights"] in peft_space.CHANGES_BASE
            return
        changes = [peft_space.stock_change(each, base) for each in sources]
        if drawn.get("use_dora") and drawn != other:  # no mean of the updates: DoRA's are not linear in the factors
            return
        expected = {name: (change + changes[1].get(name, 0)) / 2 for name, change in changes[0].items()}
        assert_close(peft_space.stock_change(out, base), expected, EPSILON[drawn["dtype"]], (drawn, alpha))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(SOMETHING, st.booleans())
def test_a_vector_of_density_1_expands_to_what_stock_peft_makes_of_the_adapter(
    base: Path, drawn: dict[str, Any], balance: bool
) -> None:
    with tempfile.TemporaryDirectory() as root:
        sources, small, out = made(Path(root), base, [drawn]), Path(root, "small"), Path(root, "expanded")
        if not sources:
            return
        method = ComPEFT(density=1, variant="prune", balance=balance)
        if not accepted(lambda: compress(method, str(sources[0]), small, TernaryOptions()), sources):
            assert not is_plain(drawn) or drawn["init_lora_weights"] in peft_space.CHANGES_BASE
            return
        expand(str(small), out, ExpandOptions())
        expected = peft_space.stock_change(sources[0], base)
        assert_close(peft_space.stock_change(out, base), expected, EPSILON[drawn["dtype"]], drawn)
