"""Write a GGUF file, one tensor in memory at a time."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import compresskit
from compresskit.errors import NumericalError
from compresskit.exporting.planned import PlannedFile, PlannedTensor

if TYPE_CHECKING:
    from gguf import GGUFWriter

MANIFEST_KEY = "compresskit.manifest"
"""Key of the text with what ran, on what, with which settings; llama.cpp passes over it."""
QUANTIZATION_VERSION = 2
"""Of ggml's block types."""


def write(planned: PlannedFile, path: Path, manifest: str, finished: Callable[[int], None]) -> dict[str, float]:
    """Write a file. `finished` is told the number of finished tensors.

    Returns:
        The relative error of every tensor, by name.

    Raises:
        NumericalError: a type cannot hold a weight.
    """
    from gguf import GGUFWriter

    logging.getLogger("gguf.gguf_writer").setLevel(logging.ERROR)
    writer = GGUFWriter(path, planned.architecture)
    try:
        writer.add_quantized_by(f"compresskit {compresskit.__version__}")
        writer.add_string(MANIFEST_KEY, manifest)
        planned.describe(writer)
        for tensor in planned.tensors:
            _announce(writer, tensor)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        errors = {}
        for number, tensor in enumerate(planned.tensors, start=1):
            made, errors[tensor.name] = tensor.make()
            if made.nbytes != tensor.bytes:
                raise NumericalError(
                    f"{tensor.name}: {made.nbytes} bytes instead of {tensor.bytes}; this is a bug, please report it"
                )
            writer.write_tensor_data(np.ascontiguousarray(made))
            finished(number)
    finally:
        writer.close()
    return errors


def _announce(writer: GGUFWriter, tensor: PlannedTensor) -> None:
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType[tensor.kind]
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)


def add_settings(writer: GGUFWriter, found: Mapping[str, Any]) -> None:
    """Add hyperparameters by the names of the writer's own methods, without `add_`."""
    from gguf import RopeScalingType

    for name, value in found.items():
        given = RopeScalingType(value) if name == "rope_scaling_type" else value
        getattr(writer, f"add_{name}")(given)


def file_type(tensors: Sequence[PlannedTensor]) -> int:
    """The number with which a file says what most of its weights are stored as."""
    from gguf import LlamaFileType

    sizes: Counter[str] = Counter()
    for tensor in tensors:
        if len(tensor.shape) > 1:
            sizes[tensor.kind] += tensor.elements
    most = sizes.most_common(1)[0][0]
    return int(LlamaFileType.ALL_F32 if most == "F32" else LlamaFileType[f"MOSTLY_{most}"])
