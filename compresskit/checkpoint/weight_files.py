"""Which files of a checkpoint folder hold its weights: those that transformers loads, in its order of preference.

    1. the file, or the files of the index, that config.json names as `transformers_weights`
    2. model.safetensors, whatever lies beside it, an index included
    3. the files of model.safetensors.index.json
    4. all of model-00001-of-0000n.safetensors to model-0000n-of-0000n.safetensors, which transformers refuses without an index

A file of another name is never read, and no tensor may stand in two files: the one that is read last would win. Two things go
before all of these in transformers and are refused: files of a distributed checkpoint, and an adapter that lies beside the
weights and is added to them.
"""

from __future__ import annotations

import re
from pathlib import Path

from compresskit.checkpoint.small_files import inside, read_json, shown
from compresskit.errors import CheckpointError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"model-(\d{1,9})-of-(\d{1,9})\.safetensors", re.ASCII)
DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors")
NAMED = "transformers_weights"
"""Key of config.json."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "model*.ckpt")


def weight_files(folder: Path, named: object = None) -> tuple[list[Path], dict[str, str]]:
    """Find the safetensors files of a folder; `named`: what config.json has under `transformers_weights`.

    Returns:
        (the files in order, the index's map of tensors to files; empty where the files were found without it).

    Raises:
        CheckpointError: there are none, the index is damaged, they make no single set, or transformers would add others.
    """
    _check_others(folder)
    if named is not None:
        return _named_files(folder, named)
    if (folder / WHOLE).is_file():
        return [folder / WHOLE], {}
    if (folder / INDEX).is_file():
        return _indexed_files(folder, folder / INDEX)
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


def ignored_files(folder: Path, files: list[Path]) -> list[str]:
    """Names of the files beside these that look like weights, and are not read."""
    read = {file.name for file in files}
    patterns = ("*.safetensors", *PICKLES, *((INDEX,) if WHOLE in read else ()))
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern)} - read)


def _check_others(folder: Path) -> None:
    """Raise CheckpointError where transformers reads something else, or more, than the weight files."""
    shards = sorted(path.name for path in folder.glob("shard-*.safetensors") if DISTRIBUTED.fullmatch(path.name))
    if shards:
        raise CheckpointError(
            f"{folder}: holds a distributed checkpoint ({shards[0]}), which transformers reads in place of all other files; "
            "load it with transformers, and save it with save_pretrained"
        )
    config, *weights = ADAPTER
    if (folder / config).is_file() and any((folder / name).is_file() for name in weights):
        raise CheckpointError(
            f"{folder}: holds an adapter ({config}) beside the weights, which transformers adds to them; move the adapter into a "
            "folder of its own and pass it as --adapter, or merge it"
        )


def _named_files(folder: Path, named: object) -> tuple[list[Path], dict[str, str]]:
    where = f"{folder / 'config.json'}: {NAMED}"
    path = inside(folder, named, where, subfolders=True)
    if not path.is_file():
        raise CheckpointError(f"{where} names {shown(named)}, which is not there; download the checkpoint again")
    if path.name.endswith(".safetensors.index.json"):
        return _indexed_files(folder, path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{where} is {shown(named)}, which is no safetensors file; remove the key to read {WHOLE}")
    return [path], {}


def _indexed_files(folder: Path, index: Path) -> tuple[list[Path], dict[str, str]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map; restore the file from its source")
    wrong = [value for value in weight_map.values() if not isinstance(value, str)]
    if wrong:
        raise CheckpointError(f"{index}: {shown(wrong[0])} is no name of a file; restore the file from its source")
    return [inside(folder, name, index) for name in sorted(set(weight_map.values()))], weight_map


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
