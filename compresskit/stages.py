"""What each stage is given and what its methods must provide. Loads no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compresskit.layouts import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.channels import Channels

Allocation = Literal["cfsp", "uniform", "global"]
LARGEST_STEP = 128
"""Widths in multiples of 128 fill the tiles of tensor cores (CFSP, section 4.1)."""
FEWEST_STEPS = 32
"""The default rounding step leaves at least this many widths to choose from."""


class Method(BaseModel):
    """A method is its settings: a frozen model whose fields are the hyperparameters.

    Flags of the command line, keys of a recipe and the manifest's settings are three spellings of the same fields; the
    line under a field is its help text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class PruneMethod(Method):
    """Remove channels of the feed-forward networks.

    A method gives one score a channel; the shared walk (prune/structured.py) allots widths to blocks, keeps the best
    channels of each, refits the output projection and writes.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the FFN channels to remove."""
    allocation: Allocation = "uniform"
    """How the share is dealt to the blocks: by block importance, alike, or by one threshold for all channels."""
    round_to: Annotated[int, Field(ge=0)] = 0
    """Widths are multiples of this; 0 picks 128, or less where the FFN is small."""
    refit: bool = True
    """Refit the output projection to the calibration outputs by least squares."""
    layout: Layout = "ragged"
    """How widths that differ between blocks are stored."""

    needs_activations: ClassVar[bool] = True
    """Whether the scores need calibration text (without a refit)."""
    needs_covariance: ClassVar[bool] = False
    """Whether the scores need all second moments, not only each channel's."""

    @property
    def adds_bias(self) -> bool:
        """Whether the method corrects the output bias, where the family has one."""
        return False

    def channel_scores(self, channels: Channels) -> Tensor:
        """Importance of every channel of one feed-forward network, (width,), larger is more important."""
        raise TypeError(f"{type(self).__name__} defines no channel_scores")

    def widths_step(self, widest: int) -> int:
        """The rounding step for a model whose widest FFN has this width."""
        return self.round_to or default_step(widest)


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


def default_step(widest: int) -> int:
    """The largest power of two up to 128 that leaves at least 32 widths to choose from."""
    largest = max(1, widest // FEWEST_STEPS)
    return min(LARGEST_STEP, 1 << int(math.log2(largest)))
