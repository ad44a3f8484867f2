"""Stock networks with experts, cut by hand: the tensors of a source's own state, some entries an expert left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

OF_A_ROUTER = (".gate.weight", "router.weight", "router.bias", "e_score_correction_bias")


def stock(folder: Path) -> Any:
    """The folder's model, as stock transformers loads it, in float32; every tensor must be there."""
    network, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"], info
    return network.eval()


def logits_of(network: Any) -> torch.Tensor:
    """Logits of 24 random tokens, none special."""
    tokens = torch.randint(3, 100, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: torch.Tensor = network(input_ids=tokens, use_cache=False).logits
    return found


def expert_blocks(folder: Path) -> list[int]:
    """Numbers of the blocks with experts, by the names of the stock network's state."""
    names = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return sorted({int(name.split(".layers.")[1].split(".")[0]) for name in names if ".experts." in name})


def edited(source: Path, out: Path, kept: dict[int, list[int]], downs: dict[str, torch.Tensor]) -> Any:
    """The source's stock network, cut by hand to the experts that stay, in a network of OUT's config.json.

    `downs`: stored tensors of OUT; the output projections among them replace the source's.
    """
    state = stock(source).state_dict()
    for name in list(state):
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) not in kept:
            continue
        experts = kept[int(name.split(".layers.")[1].split(".")[0])]
        if ".experts." in name or name.endswith(OF_A_ROUTER):
            axis = 1 if name.endswith("moe_statics.e_score_correction_bias") else 0
            state[name] = state[name].index_select(axis, torch.tensor(experts))
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32).eval()
    if downs:
        written = stock(out).state_dict()
        for name in state:
            if name.endswith(("experts.down_proj", "experts.output_linear.weight")):
                assert not torch.equal(state[name], written[name])
                state[name] = written[name]
    made.load_state_dict(state)
    return made
