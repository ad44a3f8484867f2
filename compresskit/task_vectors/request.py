"""What `quantize compeft`, `expand` and `merge` take besides a method's settings. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class TernaryOptions(BaseModel):
    """What compeft takes besides its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """The checkpoint that SOURCE was fine-tuned from; for an adapter only --alpha auto reads it."""
    validation: str | None = None
    """Text on which --alpha auto is picked: FILE.txt, .jsonl or .parquet, hub:DATASET."""
    windows: Annotated[int, Field(ge=1)] = 8
    """Windows of that text."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in a window."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; for --alpha auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward passes for --alpha auto."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""
    trust_remote_code: bool = False
    """Run the code that a checkpoint brings."""


class ExpandOptions(BaseModel):
    """How to expand."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """The checkpoint to which the vector is added; for a vector of a whole checkpoint."""
    max_shard_size: str = "5GB"
    """Largest weight file of a checkpoint."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""


class MergeOptions(BaseModel):
    """Besides the method's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """The checkpoint that the sources were fine-tuned from; for whole checkpoints, which are merged into one."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Merge LoRA adapters as updates of the weights and factorise the result at this rank."""
    max_shard_size: str = "5GB"
    """Largest weight file of a checkpoint."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""
