"""Settings shared by all stages: the base class of methods and the common options."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from compresskit.errors import RequestError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """Parse a size such as "5GB" into bytes (5,000,000,000). Raises RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise RequestError(f"--max-shard-size {text!r}: not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


class Method(BaseModel):
    """Base class of methods: a frozen model whose fields are the hyperparameters.

    Each field is a flag of the command line, a key in a recipe and a setting in the manifest. The docstring under a field
    is its help text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Options(BaseModel):
    """Options of every stage: source, output, calibration text and device."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    calibration: str = "self"
    """Calibration text: FILE.txt, .jsonl or .parquet, hub:DATASET, self (sampled from the model), builtin; A+B mixes."""
    samples: Annotated[int, Field(ge=1)] = 128
    """Number of calibration windows."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens per calibration window."""
    seed: int = 0
    """Seed of all random choices."""
    device: str = "auto"
    """Device: cpu, cuda, cuda:1 or mps; auto uses the accelerator if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward passes; auto is float32 on the CPU and the checkpoint's own dtype elsewhere."""
    max_shard_size: str = "5GB"
    """Maximum size of a weight file."""
    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    resume: bool = False
    """Resume an interrupted run of the same command."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
    trust_remote_code: bool = False
    """Run code that the checkpoint ships."""

    @property
    def shard_bytes(self) -> int:
        """`max_shard_size` in bytes. Raises RequestError if it is not a size."""
        return parse_bytes(self.max_shard_size)
