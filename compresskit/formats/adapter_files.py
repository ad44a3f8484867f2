"""The tensors of an adapter's folder under the names that stock peft saves: lora_A.weight, not lora_A.default.weight.

peft loads two spellings of a key, the one that it saves and the one of the network in memory, which has the name of the adapter
("default") in it. All others it passes over with a warning, so that the update is silently 0. They are refused here.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from compresskit.checkpoint.reader import Checkpoint, Stored, TensorSpec, tensors_in
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import LARGEST_CONFIG_BYTES, read_json, shown
from compresskit.errors import CheckpointError

WEIGHTS = "adapter_model.safetensors"
TERNARY = "adapter_model.compeft.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
LOADED_AS = "default"
"""Name under which peft loads an adapter."""
PARAMETER = re.compile(r"(.+\.(?:lora_(?:embedding_)?[AB]|lora_magnitude_vector|ia3_l))(?:\.(.+))?", re.DOTALL)
"""A parameter of LoRA or IA3, and what follows it: a leaf, an adapter's name, or both."""
LEAVES = ("weight", "bias")
WITH_LEAF = (".lora_A", ".lora_B")
"""Parameters that peft saves with a leaf."""
FACTOR = re.compile(r"(?:^|\.)(?:lora_|ia3_l)")


def open_tensors(folder: Path) -> Checkpoint:
    """Open the configuration and the tensors of an adapter's folder.

    Returns:
        The tensors, under the names that peft saves; no weights are read.

    Raises:
        CheckpointError: a file is missing or damaged, or peft would pass a tensor over.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: has no {CONFIG}; point to the folder of a PEFT adapter")
    path = folder / WEIGHTS
    if (folder / TERNARY).is_file():
        raise CheckpointError(f"{folder}: is a ternary task vector; make an adapter of it with compresskit expand")
    if not path.is_file():
        raise CheckpointError(f"{folder}: an adapter without {WEIGHTS}; save it with peft as safetensors")
    config = read_json(folder / CONFIG, LARGEST_CONFIG_BYTES)
    held = {spec.name: spec for spec in tensors_in(path)}
    found: dict[str, TensorSpec] = {}
    for spec in held.values():
        name = saved_name(path, spec.name)
        if name in found:
            raise CheckpointError(f"{path}: holds {name} twice, once as {spec.name}; save the adapter again with peft")
        found[name] = TensorSpec(name, spec.dtype, spec.shape)
    files = dict.fromkeys([*found, *held], path)
    if found.keys() == held.keys():
        return Checkpoint(folder, config, found, files, read_manifest(folder))
    as_held = Checkpoint(folder, config, held, dict.fromkeys(held, path))
    readers = {name: partial(as_held.read, old) for name, old in zip(found, held, strict=True) if name != old}
    stored = Stored("names with an adapter's name", held, readers)
    return Checkpoint(folder, config, found, files, read_manifest(folder), stored)


def saved_name(path: Path, name: str) -> str:
    """The name under which peft saves a tensor of an adapter; raises CheckpointError for one that peft passes over."""
    if not FACTOR.search(name):
        return name
    if not name.startswith(PREFIX):
        what = f"{shown(name)} does not begin with {PREFIX}, and peft loads no such key"
        raise CheckpointError(f"{path}: {what}; save the adapter again with peft, or rename the keys")
    match = PARAMETER.fullmatch(name)
    parts = match[2].split(".") if match and match[2] else []
    leaf = parts.pop() if parts and parts[-1] in LEAVES else ""
    if match is None or not parts:
        return name
    if parts != [LOADED_AS]:
        what = f"{shown(name)} carries the name of an adapter, and peft loads no such key"
        raise CheckpointError(f"{path}: {what}; save the adapter again with peft, or rename the keys")
    return f"{match[1]}.{leaf}" if leaf and match[1].endswith(WITH_LEAF) else match[1]
