"""What the files of a quantised checkpoint hold, before anything is computed. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from compresskit.checkpoint.reader import TensorSpec
from compresskit.model import Model
from compresskit.scheme import Scheme
from compresskit.stages import QuantizeMethod


def output_plan(method: QuantizeMethod, model: Model, schemes: Mapping[str, Scheme | None], scale_dtype: str) -> list[TensorSpec]:
    """Every tensor of the result, in the source's order; `schemes` by plain name, `scale_dtype` in safetensors' spelling."""
    blocks = model.stored_name(model.architecture.blocks + ".")
    weights = {model.stored_name(f"{name}.weight"): name for name in schemes}
    specs = []
    for stored, spec in model.checkpoint.tensors.items():
        name = weights.get(stored)
        if name is None:
            halved = method.embedding_bits == 16 and spec.dtype == "F32" and not stored.startswith(blocks)
            specs.append(replace(spec, dtype=scale_dtype) if halved else spec)
        else:
            specs += method.plan(model.stored_name(name), model.linear_shape(name), schemes[name], scale_dtype)
    return specs
