"""models/loadable.py: packed linears that stock tools could not unpack are refused before any work, all others are taken.

Oracle: what stock transformers was found to load, family by family.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from families import build
from tiny_models import FAMILIES, PACKED

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.models.load import open_model
from compresskit.models.loadable import check_loadable, quantised_linears

pytestmark = pytest.mark.usefixtures("own_structures")

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_s_linears_can_be_packed_unless_they_are_transposed(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    if family in PACKED:
        check_loadable(model, (), 4, symmetric=True)
        return
    with pytest.raises(UnsupportedArchitecture, match=f"{family}: its linears are stored transposed.*use quantize nf4"):
        check_loadable(model, (), 4, symmetric=True)


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("olmo_hybrid", r"transformers converts model\.layers\.0\.linear_attn\.conv1d\.weight on loading.*prune it instead"),
        ("llama4_text", r"transformers puts linears in place of its experts' one tensor.*prune it instead"),
        ("gpt_bigcode", ""), ("mamba", ""), ("bloom", ""), ("nemotron_h", ""), ("gemma4", ""),
    ],
)  # fmt: skip
def test_other_types_can_be_packed_unless_transformers_changes_their_tensors(model_type: str, said: str, tmp_path: Path) -> None:
    model = open_model(build(model_type, tmp_path / "model"))
    if not said:
        check_loadable(model, (), 4, symmetric=True)
        return
    with pytest.raises(UnsupportedArchitecture, match=f"{model_type}: {said}"):
        check_loadable(model, (), 4, symmetric=True)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("ignore", ["experts", "down_proj", "experts.2", "layers.2"])
def test_experts_are_packed_all_or_not_at_all(ignore: str, family: str, tiny: dict[str, Path]) -> None:
    with pytest.raises(UnsupportedArchitecture, match=rf"--ignore {ignore}: leaves .* dense; stock tools unpack all experts"):
        check_loadable(open_model(tiny[family]), (ignore,), 4, symmetric=True)


@pytest.mark.parametrize("ignore", ["self_attn", "o_proj", "layers.0.self_attn", "shared_expert."])
def test_what_is_no_expert_may_stay_dense(ignore: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny["qwen2_moe"])
    check_loadable(model, (ignore,), 4, symmetric=True)
    assert set(model.linears) - set(quantised_linears(model, (ignore,))) == {name for name in model.linears if ignore in name}


@pytest.mark.parametrize("ignore", ["down_proj", "layers.2", "mlp"])
def test_a_model_without_experts_may_keep_any_linear_dense(ignore: str, tiny: dict[str, Path]) -> None:
    check_loadable(open_model(tiny["llama"]), (ignore,), 4, symmetric=False)


@pytest.mark.parametrize(
    ("family", "bits", "symmetric", "kind", "said"),
    [
        ("mixtral", 2.5, True, UnsupportedArchitecture, "pass whole --bits"),
        ("mixtral", 3, False, UnsupportedArchitecture, "pass --symmetric"),
        ("llama", 3.5, False, RequestError, "--bits 3.5 --asymmetric"),
    ],
)
def test_grids_that_stock_tools_do_not_read_are_refused(
    family: str, bits: float, symmetric: bool, kind: type[Exception], said: str, tiny: dict[str, Path]
) -> None:
    with pytest.raises(kind, match=said):
        check_loadable(open_model(tiny[family]), (), bits, symmetric)
