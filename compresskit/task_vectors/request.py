"""What `quantize compeft`, `expand` and `merge` take besides a method's settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class TernaryOptions(BaseModel):
    """What compeft takes besides its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """Checkpoint from which SOURCE was fine-tuned; adapters need it only for --alpha auto."""
    validation: str | None = None
    """Validation text for --alpha auto: FILE.txt, .jsonl or .parquet, hub:DATASET."""
    windows: Annotated[int, Field(ge=1)] = 8
    """Number of validation windows."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per window."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; for --alpha auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward passes for --alpha auto."""
    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
    trust_remote_code: bool = False
    """Run code that the checkpoint ships."""


class ExpandOptions(BaseModel):
    """How to expand."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """Checkpoint to which the vector is added; for a vector of a whole checkpoint."""
    max_shard_size: str = "5GB"
    """Maximum size of a weight file; those of an archive come out as they went in."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Threads that decode an archive; 0: one for each core that this process may use."""
    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""


class MergeOptions(BaseModel):
    """Besides the method's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """Checkpoint from which the sources were fine-tuned; for whole checkpoints, PiSSA and OLoRA at a --rank, --validation."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Merge LoRA adapters as updates of weights, embeddings and biases, and factorise the result at this rank."""
    validation: tuple[str, ...] = ()
    """Text to choose scaling and weights by: FILE.txt, .jsonl or .parquet, hub:DATASET, builtin; repeat, one for each task."""
    windows: Annotated[int, Field(ge=1)] = 8
    """Number of windows of each validation text."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens per validation window."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; for --validation."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward passes for --validation."""
    max_shard_size: str = "5GB"
    """Maximum size of a weight file."""
    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
    trust_remote_code: bool = False
    """Run code that the checkpoint ships; for --validation."""
