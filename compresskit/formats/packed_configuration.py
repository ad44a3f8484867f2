"""`quantization_config` of config.json that announces packed integers to transformers, peft and vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from compresskit.formats.compressed_tensors import FORMAT
from compresskit.numerics.scheme import Scheme

EXPERT = re.compile(r"\.experts\.\d+\.")
"""In the name of a linear of one of several experts."""
LINEARS = "Linear"
"""Target of all linears that no group before targets."""


def configuration(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `schemes`: by module name; `ignored`: dense linears.

    transformers unpacks on loading, into the scale's dtype, where all linears have one scheme or all experts one and all other
    linears one. The experts' group stands first, and its pattern says so.

    Returns:
        The value of the key.
    """
    by_targets, groups = _by_targets(schemes), {}
    for index, (targets, scheme) in enumerate(by_targets):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group_size else "channel",
            "group_size": scheme.group_size or None,
            "dynamic": False,
            "observer": "minmax",
        }
        groups[f"group_{index}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT,
        }  # fmt: skip
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config | {"dequantize": True} if LINEARS in by_targets[-1][0] else config


def _by_targets(schemes: Mapping[str, Scheme]) -> list[tuple[list[str], Scheme]]:
    """(targets, scheme) of every group, the first of which that targets a linear counts."""
    distinct = list(dict.fromkeys(schemes.values()))
    if len(distinct) == 1:
        return [([LINEARS], distinct[0])]
    experts, others = ({schemes[name] for name in schemes if bool(EXPERT.search(name)) == own} for own in (True, False))
    if len(experts) == len(others) == 1:
        return [([f"re:.*{EXPERT.pattern}"], experts.pop()), ([LINEARS], others.pop())]
    return [(_targets(schemes, scheme), scheme) for scheme in distinct]


def _targets(schemes: Mapping[str, Scheme], scheme: Scheme) -> list[str]:
    """Target patterns of the linears with one of several schemes: of whole blocks, else of the same linears of several blocks."""
    of_block: dict[str, list[str]] = {}
    for name in schemes:
        of_block.setdefault(_block(name), []).append(name)
    blocks_of: dict[str, list[str]] = {}
    for block, names in of_block.items():
        own = [name for name in names if schemes[name] == scheme]
        for inner in [".*"] if own == names else [re.escape(name.removeprefix(f"{block}.")) + "$" for name in own]:
            blocks_of.setdefault(inner, []).append(block)
    inner_of: dict[tuple[str, ...], list[str]] = {}
    for inner, blocks in blocks_of.items():
        inner_of.setdefault(tuple(blocks), []).append(inner)
    return [_pattern(blocks, inner) for blocks, inner in inner_of.items()]


def _block(name: str) -> str:
    """Module path of the block of a linear."""
    return re.sub(r"(\.\d+)\..*", r"\1", name)


def _pattern(blocks: Sequence[str], inner: Sequence[str]) -> str:
    """Build a target pattern from module paths of blocks with a common prefix, and patterns of linears inside them."""
    prefix = blocks[0].rpartition(".")[0]
    numbers = "|".join(block.rpartition(".")[2] for block in blocks)
    inside = inner[0] if len(inner) == 1 else f"({'|'.join(inner)})"
    return f"re:{re.escape(prefix)}\\.({numbers})\\.{inside}"
