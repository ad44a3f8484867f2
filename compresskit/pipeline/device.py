"""Where and how precisely to compute, and sizes as users write them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from compresskit.errors import RequestError
from compresskit.model import Model

if TYPE_CHECKING:
    import torch

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(text: str) -> int:
    """The bytes of a size as users write it, such as "5GB" for 5,000,000,000; RequestError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise RequestError(f"--max-shard-size {text!r}: not a size; write for example 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def choose_device(name: str, dtype: str, model: Model) -> tuple[torch.device, torch.dtype]:
    """The device and the precision of the forward passes; RequestError where there is no such device here."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from error
    if dtype == "auto":
        stored = {spec.dtype for spec in model.checkpoint.tensors.values()}
        half = {"BF16": "bfloat16", "F16": "float16"}
        dtype = "float32" if device.type == "cpu" else next((half[d] for d in half if d in stored), "float32")
    chosen: torch.dtype = getattr(torch, dtype)
    return device, chosen
