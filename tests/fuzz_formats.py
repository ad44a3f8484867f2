"""Low-bit checkpoints for fuzz_readers.py: each format's configuration, weights and states, and forged ternary files."""

from __future__ import annotations

import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_mutations import Mutate, as_json, as_safetensors, changed_tree
from fuzz_sources import packed, ternary, write_json
from safetensors.torch import save_file
from stored_models import FP8, ct_config, fp8_config
from ternary_files import read as read_ternary

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.formats import bitsandbytes, open_format
from compresskit.formats.packed_configuration import configuration
from compresskit.formats.stored_forms import open_dense
from compresskit.formats.ternary.container import INDEX, metadata_checksum
from compresskit.numerics.scheme import Scheme

NAME = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS, GROUP = 16, 32, 16


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "llama", "dtype": "float32", "quantization_config": config})


def _compressed(folder: Path) -> None:
    scheme, generator = Scheme(4, GROUP, False), np.random.default_rng(0)
    tensors = {
        f"{NAME}.weight_packed": packed(generator, (ROWS, COLUMNS // 8)),
        f"{NAME}.weight_scale": torch.ones(ROWS, COLUMNS // GROUP, dtype=torch.float16),
        f"{NAME}.weight_zero_point": packed(generator, (ROWS // 8, COLUMNS // GROUP)),
        f"{NAME}.weight_shape": torch.tensor([ROWS, COLUMNS]),
    }
    config = configuration({NAME: scheme}, ["lm_head"])
    config["config_groups"]["group_0"]["targets"] = [r"re:model\.layers\.(0|1)\..*"]
    _write(folder, config, tensors)


def _gptq(folder: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        f"{NAME}.qweight": packed(generator, (COLUMNS // 8, ROWS)),
        f"{NAME}.qzeros": packed(generator, (COLUMNS // GROUP, ROWS // 8)),
        f"{NAME}.scales": torch.ones(COLUMNS // GROUP, ROWS, dtype=torch.float16),
        f"{NAME}.g_idx": torch.arange(COLUMNS, dtype=torch.int32) // GROUP,
    }
    _write(folder, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "checkpoint_format": "gptq"}, tensors)


def _awq(folder: Path) -> None:
    generator = np.random.default_rng(0)
    tensors = {
        f"{NAME}.qweight": packed(generator, (COLUMNS, ROWS // 8)),
        f"{NAME}.qzeros": packed(generator, (COLUMNS // GROUP, ROWS // 8)),
        f"{NAME}.scales": torch.ones(COLUMNS // GROUP, ROWS, dtype=torch.float16),
    }
    _write(folder, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, tensors)


def _nf4(folder: Path) -> None:
    stored, _ = bitsandbytes.quantize(torch.randn(ROWS, COLUMNS), 64, True)
    _write(folder, bitsandbytes.configuration("float32", True, []), {f"{NAME}.{leaf}": each for leaf, each in stored.items()})


def _int8(folder: Path) -> None:
    tensors = {f"{NAME}.weight": torch.ones(ROWS, COLUMNS, dtype=torch.int8), f"{NAME}.SCB": torch.ones(ROWS)}
    _write(folder, {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors)


def _fp8(folder: Path) -> None:
    tensors = {f"{NAME}.weight": torch.ones(ROWS, COLUMNS).to(FP8), f"{NAME}.weight_scale_inv": torch.ones(2, 3)}
    _write(folder, fp8_config(weight_block_size=[12, 12]), tensors)


def _fp8_groups(folder: Path) -> None:
    tensors = {f"{NAME}.weight": torch.ones(ROWS, COLUMNS).to(FP8), f"{NAME}.weight_scale": torch.ones(ROWS, COLUMNS // GROUP)}
    config = ct_config("group", group_size=GROUP)
    config["config_groups"]["group_0"]["targets"] = [r"re:model\.layers\.(0|1)\..*"]
    _write(folder, config, tensors)


def _mxfp4(folder: Path) -> None:
    blocks, scales = torch.ones(2, 4, 2, 16, dtype=torch.uint8), torch.full((2, 4, 2), 127, dtype=torch.uint8)
    _write(folder, {"quant_method": "mxfp4"}, {"experts.up_blocks": blocks, "experts.up_scales": scales})


def _made(folder: Path) -> object:
    found = open_dense(folder)
    return found.config, found.stored_as, [(spec, found.read(name)) for name, spec in found.tensors.items()]


def _weights(folder: Path) -> object:
    found = open_format(open_checkpoint(folder))
    if found is None:
        return 0
    names = [name for name in (NAME, NAME.replace("0", "1")) if found.holds(name)]
    return [(found.shape(name), found.bits(name), found.stored_tensors(name), found.read(name)) for name in names]


def as_state(data: bytes, pick: random.Random) -> bytes:
    """Change the JSON of a bitsandbytes state inside a safetensors file, and keep its length."""
    start = data.index(b'{"quant_type"')
    text = data[start : start + bitsandbytes.STATE_BYTES]
    changed = changed_tree(json.loads(text), pick).encode("utf-8", "surrogatepass")[: bitsandbytes.STATE_BYTES]
    return data[:start] + changed.ljust(bitsandbytes.STATE_BYTES) + data[start + bitsandbytes.STATE_BYTES :]


def as_forgery(data: bytes, pick: random.Random) -> bytes:
    """Change the index or the metadata of a ternary file, and make all checksums right again."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    start, end = header[INDEX]["data_offsets"]
    body = data[8 + size :]
    packed_index = body[start:end]
    metadata = header["__metadata__"]
    if pick.random() < 0.8:
        text = changed_tree(json.loads(zlib.decompress(packed_index)), pick).encode("utf-8", "surrogatepass")
        packed_index = zlib.compress(text)
        header[INDEX] |= {"shape": [len(packed_index)], "data_offsets": [start, start + len(packed_index)]}
        metadata |= {"index_crc32": f"{zlib.crc32(packed_index):08x}", "index_bytes": str(len(text))}
    else:
        key = pick.choice(sorted(metadata))
        metadata[key] = pick.choice(("", "nan", "1e999", "9" * 5000, "-1", "prune", "stc", "True", "x", "compeft", metadata[key]))
    metadata["crc32"] = metadata_checksum(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body[:start] + packed_index


def _makers(make: Callable[[Path], None], file: str) -> Callable[[Path], str]:
    def made(folder: Path) -> str:
        make(folder)
        return file

    return made


Parts = tuple[Callable[[Path], str], Mutate, Callable[[Path], object], bool, float]
FORMATS: dict[str, Parts] = {
    f"{name} {what}": (_makers(make, file), damage, _weights, False, 0.5)
    for name, make in {"compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq, "nf4": _nf4, "int8": _int8}.items()
    for what, file, damage in (("config", "config.json", as_json), ("weights", "model.safetensors", as_safetensors))
}
FORMATS |= {
    f"{name} {what}": (_makers(make, file), damage, _made, False, 0.5)
    for name, make in {"fp8": _fp8, "fp8 of compressed-tensors": _fp8_groups, "mxfp4": _mxfp4}.items()
    for what, file, damage in (("config", "config.json", as_json), ("weights", "model.safetensors", as_safetensors))
}
FORMATS["nf4 state"] = (_makers(_nf4, "model.safetensors"), as_state, _weights, False, 0.5)
FORMATS["forged ternary container"] = (ternary, as_forgery, lambda folder: read_ternary(folder / "file"), False, 1.0)
