"""What the files of a compensation hold, before anything is computed. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping

from compresskit.checkpoint.reader import TensorSpec
from compresskit.formats import peft
from compresskit.model import Model

DENSE = ("F32", "F16", "BF16")


def dense_dtype(model: Model) -> str:
    """The dtype of the tensors that are not in low bits, in safetensors' spelling."""
    dense = [spec.dtype for spec in model.checkpoint.tensors.values() if len(spec.shape) > 1 and spec.dtype in DENSE]
    return dense[0] if dense else "F16"


def factor_dtype(model: Model, bits: int) -> str:
    """The dtype of an adapter's factors of so many bits, in safetensors' spelling."""
    return peft.factor_dtype(bits, "BF16" if dense_dtype(model) == "BF16" else "F16")


def adapter_ranks(model: Model, ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks of the adapter that comes out, those of one that the model brings included; linears without any are left out."""
    before = {name: model.adapter.rank(name) if model.adapter else 0 for name in ranks}
    return {name: rank + before[name] for name, rank in ranks.items() if rank + before[name]}


def adapter_plan(model: Model, ranks: Mapping[str, int], dtype: str) -> list[TensorSpec]:
    """The factors of an adapter with these ranks."""
    return [spec for name, rank in ranks.items() for spec in peft.plan(name, model.linear_shape(name), rank, dtype)]


def merged_plan(model: Model, dtype: str) -> list[TensorSpec]:
    """The tensors of the dense checkpoint of a model: its linears in this dtype, all else as it is, in the source's order."""
    owner: dict[str, str] = {}
    for name in model.linears:
        stored = model.stored_name(name)
        packed = model.format.stored_tensors(stored) if model.format and model.is_low_bit(name) else [f"{stored}.weight"]
        owner |= dict.fromkeys(packed, name)
    specs: dict[str, TensorSpec] = {}
    for stored, spec in model.checkpoint.tensors.items():
        if stored in owner:
            shape = model.linear_shape(owner[stored])
            weight = f"{model.stored_name(owner[stored])}.weight"
            specs[weight] = TensorSpec(weight, dtype, shape[::-1] if model.architecture.transposed else shape)
        else:
            specs[stored] = spec
    return list(specs.values())
