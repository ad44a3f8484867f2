"""A recipe over the whole path, and what a run of it wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from compresskit.checkpoint.reader import sha256

TEXT = """
source: {source}
defaults: {{calibration: {text}, samples: 8, sequence_length: 64}}
steps:
  - {{prune: cfsp, sparsity: 0.25, round_to: 8}}
  - {{quantize: rtn, bits: 4, group_size: 8}}
  - {{compensate: eora, original: prune, rank: {rank}}}
  - {{evaluate: , against: source, data: {text}, windows: 2}}
gates: [size_ratio<=1, perplexity_ratio<=50]
"""
STEPS = ["prune", "quantize", "compensate", "evaluate"]
Make = Callable[..., Path]


def weights(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*.safetensors"))}
