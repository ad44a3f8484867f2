"""The doctor command: what is installed, what this machine has, what of the formats runs here, and what is broken."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compresskit
from compresskit.checkpoint.cache import cache_folder, writable_cache
from compresskit.checkpoint.cache_entries import KINDS, entries
from compresskit.checkpoint.small_files import first_line
from compresskit.errors import CompresskitError
from compresskit.numerics.units import readable_bytes

OPTIONAL = ("peft", "accelerate", "datasets", "pyarrow", "gguf", "scipy", "lm-eval", "vllm", "llama-cpp-python")
"""Packages that some commands use, and clients that load the results."""
NEEDED = re.compile(r"([\w.-]+)>=([\d.]+)")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
SIDE = 64
"""Rows and columns of the matrix on which formats are tried."""


def doctor() -> dict[str, Any]:
    """Examine the installation and the machine.

    Returns:
        The dictionary that `--json` prints; "problems" lists what keeps stages from running, each with its remedy.
    """
    found: dict[str, Any] = {"stage": "doctor", "compresskit": compresskit.__version__, "python": platform.python_version()}
    problems: list[str] = []
    found["packages"] = _packages(problems)
    found |= _machine(problems)
    found["formats"] = {name: _tried(check) for name, check in FORMATS.items()} if found["devices"] else {}
    found["cache"] = _cache(problems)
    found["hub"] = _hub()
    return found | {"problems": problems}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages(problems: list[str]) -> dict[str, str | None]:
    """Versions of what is needed and of what may be there; None for what is missing."""
    try:
        stated = importlib.metadata.requires("compresskit") or []
    except importlib.metadata.PackageNotFoundError:
        problems.append("compresskit: is not installed, its needs are unknown; pip install compresskit")
        stated = []
    found: dict[str, str | None] = {}
    for text in (each for each in stated if "extra ==" not in each):
        needed = NEEDED.match(text)
        if needed is None:
            continue
        name, least = needed[1], needed[2]
        found[name] = _version(name)
        if found[name] is None or _numbers(str(found[name])) < _numbers(least):
            problems.append(f"{name}: {found[name] or 'not installed'}, needed is {least}; pip install -U '{name}>={least}'")
    return found | {name: _version(name) for name in OPTIONAL}


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _machine(problems: list[str]) -> dict[str, Any]:
    """Processor, devices with their memory in bytes, and what torch makes of them."""
    found: dict[str, Any] = {"system": platform.platform(), "cores": os.cpu_count(), "devices": []}
    try:
        import torch

        from compresskit.evaluation.memory import available_bytes
        from compresskit.machine.precision import multiplies_bfloat16

        names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        names += ["mps"] if torch.backends.mps.is_available() else []
        for name in names:
            device = torch.device(name)
            (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).sum().item()
            cuda = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
            found["devices"].append({
                "device": name,
                "name": cuda.name if cuda else platform.processor() or platform.machine(),
                "kernels": f"sm_{cuda.major}{cuda.minor}" if cuda else torch.backends.cpu.get_cpu_capability(),
                "bfloat16": multiplies_bfloat16(device),
                "memory_bytes": cuda.total_memory if cuda else None,
                "free_bytes": available_bytes(device),
            })  # fmt: skip
        return found | {"threads": torch.get_num_threads()}
    except (ImportError, OSError, RuntimeError) as error:  # a broken or foreign build, or a driver that does not fit it
        problems.append(f"torch: does not run here ({first_line(error)}); install the build for this machine, see pytorch.org")
        return found


def _packed() -> None:
    import torch

    from compresskit.numerics.bit_packing import packed, unpacked

    codes = torch.arange(SIDE).remainder(16).sub(8).to(torch.int8).expand(SIDE, SIDE)
    assert torch.equal(unpacked(packed(codes, 4), 4, SIDE), codes)


def _four_bit() -> None:
    import torch

    from compresskit.formats.bitsandbytes import quantize

    quantize(torch.eye(SIDE), SIDE, nested=False)


def _float8() -> None:
    import torch

    torch.ones(SIDE).to(torch.float8_e4m3fn).float()


def _adapter() -> None:
    from peft import LoraConfig

    LoraConfig(r=1)


def _stock() -> None:
    from compresskit.machine.libraries import import_networks

    import_networks()


def _gguf() -> None:
    importlib.import_module("gguf")


FORMATS: dict[str, Callable[[], None]] = {
    "dense and ragged (transformers)": _stock, "compressed-tensors": _packed, "nf4 (bitsandbytes)": _four_bit,
    "float8": _float8, "adapters (peft)": _adapter, "gguf": _gguf,
}  # fmt: skip
"""Formats, with what each needs, done once."""


def _tried(check: Callable[[], None]) -> str:
    """Why a format does not work here, or "ok"."""
    try:
        check()
    except Exception as error:  # a library's import raises errors of every kind
        return first_line(error)
    return "ok"


def _cache(problems: list[str]) -> dict[str, Any]:
    folder = cache_folder()
    try:
        writable_cache("structures")
    except CompresskitError as error:
        problems.append(str(error))
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    listed = entries()
    sizes = {kind: sum(each.bytes for each in listed if each.kind == kind) for kind in KINDS}
    return {"folder": str(folder), "bytes": sizes, "free_bytes": shutil.disk_usage(existing).free}


def _hub() -> dict[str, Any]:
    """How the Hub is reached: offline or not, its cache, and whether there is a token (never which)."""
    from huggingface_hub import constants, get_token

    asked = {name: os.environ[name] for name in OFFLINE if name in os.environ}
    return {"offline": constants.is_offline_mode(), "asked": asked, "cache": str(Path(constants.HF_HUB_CACHE)),
            "endpoint": constants.ENDPOINT, "token": get_token() is not None}  # fmt: skip


def listing(found: dict[str, Any]) -> str:
    """The examination as lines for people."""
    packages = {name: version or "-" for name, version in found["packages"].items()}
    rows = [("compresskit", found["compresskit"]), ("python", found["python"]), *packages.items(), ("system", found["system"])]
    for each in found["devices"]:
        memory = [f"{readable_bytes(each[key])} {word}" for key, word in (("memory_bytes", "in all"), ("free_bytes", "free"))
                  if each[key] is not None]  # fmt: skip
        half = "bfloat16" if each["bfloat16"] else "no bfloat16"
        rows.append((each["device"], ", ".join([each["name"], each["kernels"], half, *memory])))
    rows += [(name, state) for name, state in found["formats"].items()]
    cache, hub = found["cache"], found["hub"]
    sizes = ", ".join(f"{kind} {readable_bytes(size)}" for kind, size in cache["bytes"].items())
    rows.append(("cache", f"{cache['folder']}: {sizes}; {readable_bytes(cache['free_bytes'])} free"))
    token = "with a token" if hub["token"] else "no token"
    rows.append(("hub", f"{'offline' if hub['offline'] else hub['endpoint']}, {token}, cache {hub['cache']}"))
    width = max(len(name) for name, _ in rows)
    return "\n".join([*(f"{name:{width}}  {value}" for name, value in rows), *(f"PROBLEM  {each}" for each in found["problems"])])
