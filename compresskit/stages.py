"""What every stage takes: a method, which is its settings, and the options that all stages share. Loads no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from compresskit.errors import RequestError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """The bytes of a size as users write it, such as "5GB" for 5,000,000,000; RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise RequestError(f"--max-shard-size {text!r}: not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


class Method(BaseModel):
    """A method is its settings: a frozen model whose fields are the hyperparameters.

    Flags of the command line, keys of a recipe and the manifest's settings are three spellings of the same fields; the
    line under a field is its help text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Options(BaseModel):
    """What every stage takes besides its method: where from, where to, on which text, how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    calibration: str = "self"
    """Text: FILE.txt, .jsonl or .parquet, hub:DATASET, self (sampled from the model), builtin; A+B mixes."""
    samples: Annotated[int, Field(ge=1)] = 128
    """Calibration windows."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a calibration window."""
    seed: int = 0
    """Seed of every random choice."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the accelerator where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward passes; auto is float32 on the CPU, the checkpoint's own elsewhere."""
    max_shard_size: str = "5GB"
    """Largest weight file."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""
    resume: bool = False
    """Go on with what an interrupted run of the same command left."""
    trust_remote_code: bool = False
    """Run the code that a checkpoint brings."""

    @property
    def shard_bytes(self) -> int:
        """Largest weight file, in bytes; RequestError where `max_shard_size` is no size."""
        return parse_bytes(self.max_shard_size)
