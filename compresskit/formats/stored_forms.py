"""Stored forms: dense weights that the files hold in fewer bits, made on reading, one tensor at a time.

A low-bit format (`open_format`) stays what it is: its linears keep their codes, and nothing prunes or quantizes them again.
A stored form is only how a dense model was shipped. `as_dense` gives the dense checkpoint, so that every stage and
measurement takes it like any other, and what is written is dense.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from compresskit.checkpoint.reader import Checkpoint, Stored, TensorSpec, open_checkpoint
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError
from compresskit.formats import float8, float8_configs, mxfp4, open_format
from compresskit.formats.packed_checks import COMPUTES_IN
from compresskit.machine.precision import SAFETENSORS_NAMES, TORCH_NAMES

if TYPE_CHECKING:
    from torch import Tensor

DTYPE_KEYS = ("dtype", "torch_dtype")
UNSTATED = "bfloat16"
"""Dtype of dense weights where config.json states none, or float8."""
FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


class StoredForm(Protocol):
    """The dense tensors of one checkpoint that are made from others. `name` is a dense tensor's name."""

    @property
    def dtype(self) -> str:
        """Dtype of the dense tensors, as safetensors names it."""

    @property
    def form(self) -> str:
        """What it is called in texts."""

    @property
    def names(self) -> list[str]:
        """The dense tensors that are made on reading."""

    @property
    def unused(self) -> list[str]:
        """Stored tensors of which nothing is read, such as the scales of activations."""

    def holds(self, name: str) -> bool:
        """Whether the dense tensor of this name is made on reading."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor."""

    def stored_tensors(self, name: str) -> list[str]:
        """The stored tensors of which it is made."""

    def read(self, name: str) -> Tensor:
        """Read the dense tensor, on the CPU."""


def open_stored_form(checkpoint: Checkpoint) -> StoredForm | None:
    """Return the form in which the files hold dense weights, None for dense files and for low-bit formats.

    Returns:
        The form, checked from the headers alone.

    Raises:
        CheckpointError: a scale or exponent is missing or does not fit, or nothing says how to read a tensor.
    """
    config = checkpoint.config.get("quantization_config")
    method = config.get("quant_method") if isinstance(config, dict) else None
    stated = _stated_dtype(checkpoint)
    if method == "fp8":
        return float8_configs.fine_grained(checkpoint, _dense_dtype(checkpoint))
    if method == "mxfp4":
        return mxfp4.opened(checkpoint, _dense_dtype(checkpoint))
    if method == "compressed-tensors":
        found = float8_configs.of_compressed_tensors(checkpoint, _dense_dtype(checkpoint))
        if found is not None:
            return found
    wanting = float8_configs.unexplained(checkpoint, low_bit=config is not None)
    if wanting is None:
        return None
    if config is None and stated in FLOAT8 and not any(name.endswith(float8.SCALES) for name in checkpoint.tensors):
        return float8.PlainFloat8(checkpoint)
    if config is not None:
        open_format(checkpoint)  # names a format that is not known
    kind = "" if wanting.dtype in float8.FLOAT8 else ", the scale of a quantized weight"
    raise CheckpointError(
        f"{checkpoint.file_of.get(wanting.name, checkpoint.folder)}: {wanting.name} is {wanting.dtype}{kind}, and no "
        "quantization_config in config.json says how to read it; restore config.json from the model's source"
    )


def _stated_dtype(checkpoint: Checkpoint) -> Any:
    return next((checkpoint.config[key] for key in DTYPE_KEYS if checkpoint.config.get(key)), UNSTATED)


def _dense_dtype(checkpoint: Checkpoint) -> str:
    """Dtype of the dense weights, as safetensors names it; raises CheckpointError if config.json states no known one."""
    stated = _stated_dtype(checkpoint)
    if stated in FLOAT8:
        stated = UNSTATED
    if stated not in COMPUTES_IN:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: dtype is {shown(stated)}; write one of {COMPUTES_IN}")
    return SAFETENSORS_NAMES[stated]


def as_dense(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint as the dense one that its files stand for, and any other as it is; no weights are read.

    Of the result, `tensors` and `config` are those of the dense checkpoint, `read` makes its tensors, and `files`, `hashes` and
    `bytes` remain those of the files.

    Returns:
        The dense checkpoint, with `stored` saying what the files hold.

    Raises:
        CheckpointError: nothing says how to read a tensor, or what says it does not fit.
    """
    form = None if checkpoint.stored else open_stored_form(checkpoint)
    if form is None:
        return checkpoint
    made_from = {part: name for name in form.names for part in form.stored_tensors(name)}
    unused = set(form.unused)
    tensors: dict[str, TensorSpec] = {}
    file_of = dict(checkpoint.file_of)
    for part, spec in checkpoint.tensors.items():
        name = made_from.get(part)
        if name is None and part not in unused:
            tensors[part] = spec
        elif name is not None and name not in tensors:
            tensors[name] = TensorSpec(name, form.dtype, form.shape(name))
            if part in file_of:
                file_of.setdefault(name, file_of[part])
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    config |= {key: TORCH_NAMES[form.dtype] for key in DTYPE_KEYS if config.get(key) in FLOAT8}
    if not form.names and not unused:
        return replace(checkpoint, config=config)
    readers = {name: partial(form.read, name) for name in form.names}
    stored = Stored(f"{form.form}, read as {form.dtype}", checkpoint.tensors, readers)
    return replace(checkpoint, config=config, tensors=tensors, file_of=file_of, stored=stored)


def open_dense(folder: Path) -> Checkpoint:
    """`open_checkpoint` followed by `as_dense`."""
    return as_dense(open_checkpoint(folder))
