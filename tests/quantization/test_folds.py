"""quantization/folds.py: what is found can be folded, and a folded network is the same network. Property and oracle tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from stock_tools import tokens

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.models.model import Model
from compresskit.quantization.folds import Fold, exact_factors, find_folds, fold_into, is_in_range
from compresskit.walk.block import Block
from compresskit.walk.sequence import chosen_sequence
from compresskit.walk.walk import Walk

NORMS_UP_V = ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"]
GEMMA = ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"]
FOUND = {
    "llama": NORMS_UP_V,
    "qwen2": NORMS_UP_V,
    "qwen3": NORMS_UP_V,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],  # relu keeps factors
    "gpt_neox": ["input_layernorm", None, "post_attention_layernorm", None],  # one linear for q, k and v; gelu
    "phi": [None, "self_attn.v_proj", None, None],  # one norm for attention and the feed-forward network
    "phi3": ["input_layernorm", None, "post_attention_layernorm", None],  # gate and up in one linear
}
"""The writer before each of a block's groups of linears, by family."""


def opened(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Model, Walk]:
    model = open_model(folder)
    return model, Walk(model, tokens(), Where(torch.device("cpu"), dtype))


def last_logits(walk: Walk) -> torch.Tensor:
    """Of all tokens, after the walk."""
    return torch.cat([logits for _, _, logits in walk.logits()])


def groups(model: Model, block: Block) -> list[list[tuple[str, ...]]]:
    return chosen_sequence(model, block.index, model.linears)


@pytest.mark.parametrize("family", FOUND)
def test_folds_with_any_factors_leave_a_family_as_it_is(family: str, tiny: dict[str, Path]) -> None:
    model, walk = opened(tiny[family])
    untouched = opened(tiny[family])[1]
    for _ in untouched:
        pass
    reference = last_logits(untouched)
    generator = torch.Generator().manual_seed(0)
    known: list[Fold] = []
    for block in walk:
        sequence = groups(model, block)
        folds = find_folds(block, sequence, True, [fold.renamed(f"{block.name}.".__add__) for fold in known])
        known = [fold.renamed(lambda name, start=f"{block.name}.": name.removeprefix(start)) for fold in folds]
        by_reader = {fold.readers[0]: fold for fold in folds}
        firsts = [group[0] for position in sequence for group in position]
        assert [by_reader[first].writer if first in by_reader else None for first in firsts] == FOUND[family]
        for fold in folds:
            weight = next(block.module.get_submodule(fold.writer).parameters())
            wanted = torch.exp2(2 * torch.randn(len(weight), generator=generator))
            held = exact_factors(model, block, fold, wanted)
            before = {name: block.linear(name).weight.clone() for name in fold.readers}
            changed = fold_into(model, block, fold, held)
            assert all(tensor.shape == model.checkpoint.spec(name).shape for name, tensor in changed.items())
            assert all(torch.allclose(block.linear(n).weight / w, fold.spread(held).to(w)) for n, w in before.items())
    found = last_logits(walk)
    # Norms and factors are rounded to 32 bits; a wrong fold is off by the size of the logits.
    assert float((found - reference).abs().max()) < 1e-5 * float(reference.abs().max())


def test_shared_heads_have_one_factor_an_output() -> None:
    fold = Fold("v", ("o",), shared=(3, 2))
    factors = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert fold.spread(factors).tolist() == [1, 2] * 3 + [3, 4] * 3
    assert fold.gathered(torch.arange(12.0)).tolist() == [2, 3, 8, 9]


def test_a_norm_in_16_bits_holds_its_factors_to_the_bit(tiny: dict[str, Path]) -> None:
    model, walk = opened(tiny["llama"], torch.float32)
    block = next(iter(walk))
    fold = find_folds(block, groups(model, block), with_linears=False)[0]
    before = block.module.get_submodule(fold.writer).get_parameter("weight").clone()
    before[3] = 0
    block.module.get_submodule(fold.writer).get_parameter("weight").data = before
    wanted = torch.linspace(0.3, 3, len(before))
    held = exact_factors(model, block, fold, wanted)
    name = model.stored_name(f"{block.name}.{fold.writer}.weight")
    stored = fold_into(model, block, fold, held)[name]
    assert torch.equal(stored.float(), block.module.get_submodule(fold.writer).get_parameter("weight"))
    assert torch.allclose(stored.float() * held, before, rtol=1e-6)
    assert float(held[3]) == 1
    assert float((held / wanted - 1).abs()[before != 0].max()) < 2**-7


def test_factors_that_a_16_bit_scale_does_not_hold_are_told(tiny: dict[str, Path]) -> None:
    model, walk = opened(tiny["llama"], torch.float32)
    block = next(iter(walk))
    fold = next(f for f in find_folds(block, groups(model, block), with_linears=True) if f.writer == "mlp.up_proj")
    ones = torch.ones(block.linear(f"{block.name}.mlp.up_proj").out_features)
    assert is_in_range(model, block, fold, ones, (torch.float16, 7))
    for extreme in (1e-8, 1e8):
        factors = ones.clone()
        factors[5] = extreme
        assert not is_in_range(model, block, fold, factors, (torch.float16, 7))
        assert is_in_range(model, block, fold, factors, (torch.bfloat16, 7))
