"""Choose the device and the precision. Imports torch only when a device is chosen."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from compresskit import distributed
from compresskit.errors import RequestError
from compresskit.machine.libraries import import_networks
from compresskit.machine.precision import TORCH_NAMES

if TYPE_CHECKING:
    import torch

HALF_DTYPES = ("BF16", "F16")


class Where(NamedTuple):
    """Device and precision of a model, whether code from its folder may run, and room on disk."""

    device: torch.device
    dtype: torch.dtype
    trust_remote_code: bool = False
    scratch: Path | None = None
    """Folder on disk for what does not fit into memory; None if there is none."""


def choose_device(name: str, dtype: str, stored: Collection[str], trust_remote_code: bool = False) -> Where:
    """Choose the device. `stored`: dtypes of the checkpoint, as safetensors names them. All that follows needs the networks.

    Returns:
        The device and the precision of the forward passes; `auto` is float32 on the CPU and the stored dtype elsewhere.

    Raises:
        RequestError: this machine has no such device.
    """
    import_networks()
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(distributed.own_device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(f"--device {name}: not usable here ({str(error).splitlines()[0]}); try --device cpu") from error
    if dtype == "auto":
        half = next((TORCH_NAMES[each] for each in HALF_DTYPES if each in stored), "float32")
        dtype = "float32" if device.type == "cpu" else half
    return Where(device, getattr(torch, dtype), trust_remote_code)
