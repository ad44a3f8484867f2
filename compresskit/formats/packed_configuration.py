"""`quantization_config` of config.json that announces packed integers to transformers, peft and vLLM."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from compresskit.formats.compressed_tensors import FORMAT
from compresskit.numerics.scheme import Scheme


def configuration(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `schemes`: by module name, one per block; `ignored`: dense linears."""
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, scheme in enumerate(distinct):
        targets = ["Linear"] if len(distinct) == 1 else [_pattern([n for n, each in schemes.items() if each == scheme])]
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
    return config | {"dequantize": True} if len(distinct) == 1 else config


def _pattern(names: list[str]) -> str:
    """Build a target pattern for the blocks of these linears, which have one scheme per block."""
    blocks = dict.fromkeys(re.sub(r"(\.\d+)\..*", r"\1", name) for name in names)
    prefix = next(iter(blocks)).rpartition(".")[0]
    return f"re:{re.escape(prefix)}\\.({'|'.join(block.rpartition('.')[2] for block in blocks)})\\..*"
