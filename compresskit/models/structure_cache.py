"""The structures that were derived before: read without torch, else derived and kept.

A structure depends on config.json, on the names of the stored tensors, on the shapes of packed experts and on transformers'
version, and is cached under a hash of these.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from compresskit.checkpoint.cache import cache_folder
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.whole_files import write_whole
from compresskit.errors import StorageError
from compresskit.machine.libraries import import_networks
from compresskit.models.architectures import Architecture, BlockStructure, Packed, Sizes, Sublayer
from compresskit.models.weight_names import weight_names

VERSION = 5
"""Of the derivation: a change of what it finds makes cached structures void."""
CACHE = "structures"


def derived(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Architecture:
    """Find the structure of a checkpoint's model, in the cache or from its stock network.

    Returns:
        The structure, with all fields of `Architecture` that are for derived ones.

    Raises:
        CheckpointError: transformers makes no model of the configuration.
        UnsupportedArchitecture: the network is no causal language model that can be walked block by block; the reason names
            the module.
    """
    file = cache_folder() / CACHE / f"{_key(checkpoint)}.json"
    cached = None if trust_remote_code else _read(file)
    if cached is not None:
        return cached
    import_networks()
    from compresskit.models.structure import derive

    found = derive(checkpoint, trust_remote_code)
    if not trust_remote_code:  # code beside the checkpoint may change without a change of config.json
        _store(file, found)
    return found


def _key(checkpoint: Checkpoint) -> str:
    # Whether the matrices of packed experts are transposed is told by their shapes.
    packed = {name: spec.shape for name, spec in checkpoint.tensors.items() if len(spec.shape) > 2}
    described = [VERSION, version("transformers"), checkpoint.config, weight_names(checkpoint.tensors), packed]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _store(file: Path, found: Architecture) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asdict(found)))
    except (OSError, StorageError):
        return  # the cache saves time only


def _read(file: Path) -> Architecture | None:
    """A cached structure; None if there is none that can be used."""
    try:
        return _from_json(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _from_json(found: dict[str, Any]) -> Architecture:
    kinds = tuple(
        BlockStructure(**{
            **kind, "positions": _tuples(kind["positions"]), "names": _tuples(kind["names"]),
            "packed": tuple(Packed(**each) for each in kind["packed"]),
            "untouched": _tuples(kind["untouched"]), "ffns": tuple(_sublayer(each) for each in kind["ffns"]),
        })
        for kind in found["kinds"]
    )  # fmt: skip
    plain = {key: _tuples(value) for key, value in found.items() if key not in ("kinds", "sizes", "attention")}
    return Architecture(**{**plain, "attention": _sublayer(found["attention"]), "sizes": Sizes(**found["sizes"]), "kinds": kinds})


def _sublayer(found: dict[str, Any]) -> Sublayer:
    return Sublayer(**{**found, "in_projections": tuple(found["in_projections"])})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value
