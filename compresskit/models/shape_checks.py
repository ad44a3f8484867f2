"""Whether a model's stored tensors are those of its configuration: none missing, none beyond, each in its shape. No torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from compresskit.checkpoint.reader import FLOATS, TensorSpec
from compresskit.errors import CheckpointError
from compresskit.models.model import Model

PREDICTION_BLOCKS = "num_nextn_predict_layers"
"""Key of config.json with the number of blocks after the last, which predict further tokens; transformers leaves them out."""


def check_shapes(model: Model) -> None:
    """Raise CheckpointError if a tensor is missing, or contradicts the configuration or the other blocks."""
    _check_blocks(model)
    _check_ffn_shapes(model)
    _check_dtypes(model)
    if model.format is None and not model.architecture.derived:
        _check_alike(model)  # derived blocks may differ; building the network checks every shape


def _check_alike(model: Model) -> None:
    """Raise CheckpointError unless all blocks hold the same tensors in the same shapes, and the embedding a row per token."""
    ffn_names = {
        model.stored_name(f"{name}.{leaf}")
        for index in range(model.block_count)
        for group in model.ffn_groups(index)
        for ffn in group.members
        for name in (*ffn.in_projections, ffn.out_projection)
        for leaf in ("weight", "bias")
    }
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, spec in model.checkpoint.tensors.items():
        for index_part in _block_index(model, name):
            if name not in ffn_names:
                shapes.setdefault(name.replace(index_part, ".{}.", 1), {})[name] = spec.shape
    for pattern, by_name in shapes.items():
        if len(by_name) < model.block_count and not model.architecture.experts:
            name = next(n for n in (pattern.replace("{}", str(i)) for i in range(model.block_count)) if n not in by_name)
            raise CheckpointError(f"{model.checkpoint.folder}: tensor {name} is missing; download the checkpoint again")
        usual, _ = Counter(by_name.values()).most_common(1)[0]
        for name, shape in by_name.items():
            if shape != usual:
                raise _wrong_shape(model, name, shape, usual, "as in the other blocks")
    rows = model.vocabulary
    for name in (f"{model.architecture.embedding}.weight", f"{model.architecture.head}.weight"):
        if model.has(name):
            spec = model.checkpoint.spec(model.stored_name(name))
            if spec.shape[:1] != (rows,):
                raise _wrong_shape(model, spec.name, spec.shape, (rows, *spec.shape[1:]), "by vocab_size")


def _block_index(model: Model, name: str) -> list[str]:
    """Return [".3."] for a stored name inside block 3, [] for names outside the blocks."""
    prefix = model.stored_blocks
    number = name.removeprefix(prefix).split(".")[0]
    return [f".{number}."] if name.startswith(prefix) and number.isdecimal() else []


def _check_blocks(model: Model) -> None:
    """Raise CheckpointError if tensors belong to blocks that config.json does not count; they would be left out silently."""
    further = model.checkpoint.config.get(PREDICTION_BLOCKS)
    counted = {str(index) for index in range(model.block_count + (further if type(further) is int else 0))}
    for name, spec in model.checkpoint.tensors.items():
        for part in _block_index(model, name):
            if part.strip(".") not in counted:
                raise CheckpointError(
                    f"{model.checkpoint.folder / 'config.json'}: {model.architecture.count_key} is {model.block_count}, the "
                    f"weights hold {spec.name}; restore the file from its source"
                )


def _check_dtypes(model: Model) -> None:
    """Raise CheckpointError if a weight or a bias is stored as whole numbers, but for the codes of low-bit linears."""
    tensors = model.checkpoint.tensors
    for name, spec in tensors.items():
        module, _, leaf = name.rpartition(".")
        low_bit = model.format is not None and model.format.holds(module)
        # A buffer may be named bias, as the causal mask of GPT-2: it has no weight beside it.
        weight = (leaf == "weight" and not low_bit) or (leaf == "bias" and (low_bit or f"{module}.weight" in tensors))
        if weight and spec.dtype not in FLOATS:
            raise CheckpointError(f"{_file(model, spec)}: {name} is {spec.dtype}, expected floating point; download it again")


def _file(model: Model, spec: TensorSpec) -> Path:
    """File of a tensor, the folder for planned ones."""
    return model.checkpoint.file_of.get(spec.name, model.checkpoint.folder)


def _check_ffn_shapes(model: Model) -> None:
    for index in range(model.block_count):
        for group in model.ffn_groups(index):
            stated = group.width
            if not model.ragged and group.width_key:
                stated = model.config_width(group.width_key) * group.multiple
            for ffn in group.members:
                hidden = [model.linear_shape(ffn.out_projection)[0], *(model.linear_shape(n)[1] for n in ffn.in_projections)]
                sizes = hidden if model.architecture.derived else [model.hidden_size] * len(hidden)
                _expect_linear(model, ffn.out_projection, (sizes[0], stated))
                for name, size in zip(ffn.in_projections, sizes[1:], strict=True):
                    _expect_linear(model, name, (stated * group.fused, size))


def _expect_linear(model: Model, name: str, expected: tuple[int, int]) -> None:
    if not model.has(f"{name}.weight"):
        model.checkpoint.spec(model.stored_name(f"{name}.weight"))
    found = model.linear_shape(name)
    if found != expected:
        raise _wrong_shape(model, model.stored_name(f"{name}.weight"), found, expected, "(out, in) by config.json")
    if model.has(f"{name}.bias") and model.packed(f"{name}.bias") is None:
        bias = model.checkpoint.spec(model.stored_name(f"{name}.bias"))
        if bias.shape != expected[:1]:
            raise _wrong_shape(model, bias.name, bias.shape, expected[:1], "by config.json")


def _wrong_shape(model: Model, name: str, found: tuple[int, ...], expected: tuple[int, ...], why: str) -> CheckpointError:
    file = model.checkpoint.file_of.get(name, model.checkpoint.folder)
    return CheckpointError(f"{file}: {name} has shape {list(found)}, expected {list(expected)} {why}; download it again")
