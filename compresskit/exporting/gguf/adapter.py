"""A PEFT LoRA adapter as a GGUF file.

    update of a linear = alpha / rank * B A,     rank of that linear, one alpha for the file                    (1)

Where the adapter's own scalings s fit one alpha = s * rank, its factors stay as they are. Otherwise B is multiplied by
s * rank / alpha and stored in float32. The rows of B and the columns of A change as those of the weight do (placement.py).
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.exporting.gguf import blocks
from compresskit.exporting.gguf.families import architecture_of, family_of
from compresskit.exporting.gguf.hyperparameters import configuration
from compresskit.exporting.gguf.tensors import Layout
from compresskit.exporting.planned import PlannedFile, PlannedTensor
from compresskit.formats.peft import Adapter, factor_names
from compresskit.models.model import Model

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from compresskit.exporting.gguf.placement import Placement


def adapter_file(model: Model, weights: str) -> PlannedFile:
    """Plan the file of a model's adapter. `weights`: type of the factors; auto: f16 stays, all else is f32.

    Returns:
        The file; nothing is read yet.

    Raises:
        UnsupportedArchitecture: llama.cpp does not run the base model.
        CheckpointError: the adapter states no scaling.
    """
    adapter, family = model.adapter, family_of(model)
    assert adapter is not None
    layout = Layout(model, configuration(model), family, architecture_of(model), "auto", "auto")
    alphas = {name: adapter.scaling(name) * adapter.rank(name) for name in adapter.names}
    alpha = Counter(alphas.values()).most_common(1)[0][0] or 1.0  # llama.cpp takes 0 for 1 a rank
    found = []
    for name in adapter.names:
        share = alphas[name] / alpha
        found += _planned(adapter, name, layout.placement(name), np.float32(share), weights)
    return PlannedFile(layout.architecture, found, partial(_describe, alpha))


def _planned(adapter: Adapter, name: str, place: Placement, share: np.float32, weights: str) -> list[PlannedTensor]:
    planned = []
    for stored, side in zip(factor_names(name), "ab", strict=True):
        spec = adapter.store.spec(stored)
        folded = side == "b" and share != 1
        kind = ("F16" if spec.dtype == "F16" and not folded else "F32") if weights == "auto" else weights.upper()
        columns = place.columns or spec.shape[1] if side == "a" else spec.shape[1]
        rows = spec.shape[0] if side == "a" else place.shape((spec.shape[0], 0))[0]
        kind = blocks.fitting(kind, columns)
        make = partial(_factor, adapter, stored, place, side, share if folded else np.float32(1), kind)
        full_name = f"{place.name}.weight.lora_{side}"
        planned.append(PlannedTensor(full_name, (rows, columns), kind, blocks.stored_bytes(kind, (rows, columns)), make))
    return planned


def _factor(adapter: Adapter, stored: str, place: Placement, side: str, share: np.float32, kind: str) -> tuple[Any, float]:
    values = adapter.store.read(stored).float().numpy() * share
    values = np.ascontiguousarray(place.place_columns(values) if side == "a" else place.place_rows(values))
    made = blocks.rounded(kind, values)
    return made, blocks.relative_error(blocks.restored(kind, made), values)


def _describe(alpha: float, writer: GGUFWriter) -> None:
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
