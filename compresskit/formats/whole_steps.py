"""Low-bit linears as whole steps: W = scale * steps, steps = code - zero point.

What another file format needs to carry the codes of a linear unchanged, where its groups are of consecutive inputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.errors import CheckpointError
from compresskit.formats import Format
from compresskit.formats.compressed_tensors import PackQuantized
from compresskit.formats.gptq import GPTQFile
from compresskit.formats.packed_checks import unpacking
from compresskit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


def scheme_of(stored: Format, name: str) -> Scheme | None:
    """The grid of a linear (stored name), from config.json and headers; None where it has none of consecutive inputs."""
    if isinstance(stored, GPTQFile):
        config = stored.checkpoint.config["quantization_config"]
        return None if config.get("desc_act") else Scheme(stored.width, max(stored.group_size, 0), config.get("sym") is True)
    if not isinstance(stored, PackQuantized) or f"{name}.weight_g_idx" in stored.checkpoint.tensors:
        return None
    return stored.scheme(name)


def range_of(scheme: Scheme) -> tuple[int, int]:
    """The least and the largest step that a grid can have; in GPTQ's files a zero point may be one above the largest code."""
    return (scheme.lowest, scheme.highest) if scheme.symmetric else (-scheme.steps - 1, scheme.steps)


def read_steps(stored: Format, name: str) -> tuple[Tensor, Tensor]:
    """Read a linear that has a grid.

    Returns:
        (steps (out, in) int16, scale (out, groups) float32); their product is the weight before it is rounded to a dtype.

    Raises:
        CheckpointError: the stored tensors cannot be unpacked, or are of another grid than config.json says.
    """
    if isinstance(stored, GPTQFile):
        return _of_gptq(stored, name)
    assert isinstance(stored, PackQuantized)
    with unpacking(stored.checkpoint, name):
        codes, zero_point, scale = stored.read_codes(name)
        steps: Tensor = codes.short().reshape(*scale.shape, -1) - zero_point.short().unsqueeze(-1)
        return steps.flatten(1), scale.float()


def _of_gptq(stored: GPTQFile, name: str) -> tuple[Tensor, Tensor]:
    steps, scales, group_of = stored.read_steps(name)
    if not bool((group_of.diff() >= 0).all()):
        reason = "groups its inputs by activation order, which quantization_config does not say (desc_act)"
        raise CheckpointError(f"{stored.checkpoint.folder}: {name} {reason}; set it there")
    return steps.T.short().contiguous(), scales.T.float().contiguous()
