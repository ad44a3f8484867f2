"""Which files of a checkpoint folder hold its weights: those that transformers loads, in its order of preference.

    1. model.safetensors, whatever lies beside it, an index included
    2. the files of model.safetensors.index.json
    3. all of model-00001-of-0000n.safetensors to model-0000n-of-0000n.safetensors, which transformers refuses without an index

A file of another name is never read, and no tensor may stand in two files: the one that is read last would win.
"""

from __future__ import annotations

import re
from pathlib import Path

from compresskit.checkpoint.small_files import inside, read_json, shown
from compresskit.errors import CheckpointError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{1,9})-of-(\d{1,9})\.safetensors", re.ASCII)
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "model*.ckpt")


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """Find the safetensors files of a folder.

    Returns:
        (the files in order, the index's map of tensors to files; empty where the files were found without it).

    Raises:
        CheckpointError: there are none, the index is damaged, or they make no single set.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE], {}
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map; restore the file from its source")
        wrong = [value for value in weight_map.values() if not isinstance(value, str)]
        if wrong:
            raise CheckpointError(f"{index}: {shown(wrong[0])} is no name of a file; restore the file from its source")
        return [inside(folder, name, index) for name in sorted(set(weight_map.values()))], weight_map
    files = sorted(folder.glob("model*.safetensors"))
    if files:
        return _whole_set(folder, files), {}
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code when opened; convert them once with "
            "transformers (from_pretrained, then save_pretrained) and use that folder"
        )
    raise CheckpointError(f"{folder}: no model*.safetensors in it; point to a checkpoint folder")


def _whole_set(folder: Path, files: list[Path]) -> list[Path]:
    """The shards among these files, by number; raises CheckpointError unless they are all of one set."""
    found: dict[int, Path] = {}
    total = 0
    for file in files:
        numbers = SHARD.fullmatch(file.name)
        if numbers is None:
            continue
        number, stated = int(numbers[1]), int(numbers[2])
        if number in found or stated != (total or stated) or not 0 < number <= stated:
            first = next(iter(found.values()), file).name
            raise CheckpointError(
                f"{file}: is no part of one set of shards with {first}, and no {INDEX} says which to read; "
                "keep the files of one set, or restore the index"
            )
        found[number], total = file, stated
    if not found:
        raise CheckpointError(f"{folder}: has no {WHOLE}, only {files[0].name}; rename it to {WHOLE} if it holds all weights")
    if len(found) < total:
        missing = next(number for number in range(1, total + 1) if number not in found)
        raise CheckpointError(f"{folder}: holds {len(found)} of {total} shards, number {missing} is missing; download it again")
    return [found[number] for number in sorted(found)]
