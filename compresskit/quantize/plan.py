"""What the files of a quantised checkpoint hold, before anything is computed. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping

from compresskit.checkpoint.reader import TensorSpec
from compresskit.model import Model
from compresskit.scheme import Scheme
from compresskit.stages import QuantizeMethod


def output_plan(method: QuantizeMethod, model: Model, schemes: Mapping[str, Scheme | None], scale_dtype: str) -> list[TensorSpec]:
    """Every tensor of the result, in the source's order; `schemes` by plain name, `scale_dtype` in safetensors' spelling."""
    weights = {model.stored_name(f"{name}.weight"): name for name in schemes}
    specs = []
    for stored, spec in model.checkpoint.tensors.items():
        name = weights.get(stored)
        if name is None:
            specs.append(spec)
        else:
            specs += method.plan(model.stored_name(name), model.linear_shape(name), schemes[name], scale_dtype)
    return specs
