"""Adapters of two linears with chosen scalings, and what they do to the weights, written out as scaling * B @ A."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compresskit.formats.peft import CONFIG, WEIGHTS, factor_names
from compresskit.task_vectors.merge import merge
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.request import MergeOptions

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {QUERY: (6, 5), DOWN: (4, 7)}
RANKS = {QUERY: 2, DOWN: 3}
PLAIN = {
    "peft_type": "LORA",
    "r": 2,
    "rank_pattern": {"down_proj": 3},
    "lora_alpha": 4,
    "target_modules": ["q_proj", "down_proj"],
}
EPSILON = {torch.float32: 2**-16, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""A few roundings of each dtype."""
Pair = tuple[torch.Tensor, torch.Tensor]

ALPHAS = st.sampled_from([0.5, 1, 3, 4, 16, -2])
CONFIGS = st.fixed_dictionaries(
    {"lora_alpha": ALPHAS, "use_rslora": st.booleans()},
    optional={"alpha_pattern": st.dictionaries(st.sampled_from(["q_proj", DOWN, r".*\.0\.mlp\.down_proj"]), ALPHAS)},
)
DTYPES = st.sampled_from(list(EPSILON))


def random_factors(seed: int, dtype: torch.dtype = torch.float32, ranks: dict[str, int] = RANKS) -> dict[str, Pair]:
    """Factors A (rank, in) and B (out, rank) of each linear."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(ranks[name], columns, generator=generator).to(dtype),
            torch.randn(rows, ranks[name], generator=generator).to(dtype),
        )
        for name, (rows, columns) in SHAPES.items()
    }


def write(folder: Path, factors: dict[str, Pair], **config: Any) -> Path:
    """An adapter's folder."""
    folder.mkdir(parents=True)
    tensors = {n: t for name, pair in factors.items() for n, t in zip(factor_names(name), pair, strict=True)}
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(PLAIN | config))
    return folder


def scaling(name: str, config: dict[str, Any], rank: int | None = None) -> float:
    """What peft's documentation says, for the names and patterns of this file."""
    found = [v for key, v in config.get("alpha_pattern", {}).items() if name.endswith(key.rpartition("\\.")[2])]
    alpha = found[0] if found else config["lora_alpha"]
    rank = rank or RANKS[name]
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def stored(folder: Path) -> dict[str, Pair]:
    """Factors A and B of each linear in a folder, float64."""
    tensors = load_file(folder / WEIGHTS)
    return {name: (tensors[a].double(), tensors[b].double()) for name in SHAPES for a, b in [factor_names(name)]}


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """What the adapter in a folder adds to each weight (out, in)."""
    config, factors = config_of(folder), stored(folder)
    return {name: scaling(name, config, len(a)) * b @ a for name, (a, b) in factors.items()}


def merged(method: MergeMethod, sources: Sequence[Path], rank: int | None = None) -> Path:
    out = Path(tempfile.mkdtemp(dir=sources[0].parent)) / "merged"
    merge(method, [str(each) for each in sources], out, MergeOptions(rank=rank))
    return out


def assert_close(out: Path, expected: dict[str, torch.Tensor], epsilon: float, context: object = "") -> None:
    """Compare updates; errors are measured by the largest product of the merged factors' magnitudes."""
    config, found = config_of(out), updates(out)
    for name, (a, b) in stored(out).items():
        bound = epsilon * (abs(scaling(name, config)) * (b.abs() @ a.abs()).max() + 0.1)
        assert bool(((found[name] - expected[name]).abs() <= bound).all()), (name, found[name], expected[name], context)
