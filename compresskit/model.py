"""An opened checkpoint whose family is known: its names, its feed-forward networks, and the check of its shapes.

Loads no torch, so that a checkpoint that contradicts its configuration is refused in under a second.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from compresskit.architectures import ARCHITECTURES, HEAD, RAGGED_PREFIX, Architecture
from compresskit.checkpoint.reader import Checkpoint, open_checkpoint
from compresskit.errors import CheckpointError, RequestError, UnsupportedArchitecture, near_miss
from compresskit.formats import Format, open_format
from compresskit.formats.peft import FOLDER as ADAPTER_FOLDER
from compresskit.formats.peft import Adapter, factor_names, open_adapter


@dataclass(frozen=True)
class Ffn:
    """The linears of one feed-forward network (of one expert), by plain name; they share their channels."""

    in_projections: tuple[str, ...]
    out_projection: str


@dataclass(frozen=True)
class FfnGroup:
    """Feed-forward networks of one block that must have the same width: one network, or all experts of a block."""

    block: int
    width_key: str
    width: int
    fused: int
    members: tuple[Ffn, ...]


@dataclass(frozen=True)
class Model:
    """An opened checkpoint whose family is known."""

    checkpoint: Checkpoint
    family: str
    architecture: Architecture
    removed_prefix: str = ""
    """Leading part of plain names that this checkpoint leaves out (GPT-2 and OPT files of the Hub)."""
    format: Format | None = None
    """How its low-bit linears are stored; None for a dense checkpoint."""
    adapter: Adapter | None = None
    """A low-rank update that belongs to the weights."""

    @property
    def ragged(self) -> bool:
        """Whether the blocks' widths come from `block_configs` (our ragged layout)."""
        return str(self.checkpoint.config.get("model_type", "")).startswith(RAGGED_PREFIX)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.checkpoint.config[self.architecture.hidden_key])

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        return int(self.checkpoint.config[self.architecture.count_key])

    @property
    def quantized(self) -> bool:
        """Whether the weights are stored in low-bit form."""
        return "quantization_config" in self.checkpoint.config

    def block_name(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.architecture.blocks}.{index}"

    def stored_name(self, name: str) -> str:
        """The checkpoint's name of a plain name."""
        architecture = self.architecture
        inside = name.startswith(architecture.blocks + ".")
        for plain, stored in architecture.renames if inside else architecture.outer_renames:
            name = name.replace(plain, stored)
        return name.removeprefix(self.removed_prefix)

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores the tensor with this plain name, in whatever form."""
        return self.stored_name(name) in self.checkpoint.tensors or self.is_low_bit(name.removesuffix(".weight"))

    def is_low_bit(self, name: str) -> bool:
        """Whether the linear with this plain name is stored in low-bit form."""
        return self.format is not None and self.format.holds(self.stored_name(name))

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the linear with this plain name."""
        if self.format is not None and self.is_low_bit(name):
            return self.format.shape(self.stored_name(name))
        rows, columns = self.checkpoint.spec(self.stored_name(f"{name}.weight")).shape
        return (columns, rows) if self.architecture.transposed else (rows, columns)

    def ffn_groups(self, index: int) -> list[FfnGroup]:
        """The prunable feed-forward networks of block `index`."""
        return self._ffn_groups[index]

    @cached_property
    def _ffn_groups(self) -> list[list[FfnGroup]]:
        return [self._groups_of_block(index) for index in range(self.block_count)]

    def _groups_of_block(self, index: int) -> list[FfnGroup]:
        block = self.block_name(index)
        groups = []
        for sublayer in self.architecture.ffns:
            members = []
            names = (*sublayer.in_projections, sublayer.out_projection)
            experts = range(self._most_experts) if "{expert}" in sublayer.out_projection else range(1)
            for expert in experts:
                *ins, out = (f"{block}.{name.format(expert=expert)}" for name in names)
                if not self.has(f"{out}.weight"):
                    break
                members.append(Ffn(tuple(ins), out))
            if members:
                width = self.linear_shape(members[0].out_projection)[1]
                groups.append(FfnGroup(index, sublayer.width_key, width, sublayer.fused, tuple(members)))
        if not groups:
            expected = self.stored_name(f"{block}.{self.architecture.ffns[0].out_projection.format(expert=0)}.weight")
            raise CheckpointError(f"{self.checkpoint.folder}: tensor {expected} is missing; download the checkpoint again")
        return groups

    def block_of(self, name: str) -> int:
        """Index of the block that holds the linear with this plain name."""
        return int(name.removeprefix(self.architecture.blocks + ".").partition(".")[0])

    def linear_stages(self, index: int) -> list[list[tuple[str, ...]]]:
        """The linears of block `index` in the order in which they compute, as stages of groups that share their input.

        Attention inputs, attention output, then the inputs and the outputs of all feed-forward networks (experts side
        by side). A later stage sees what an earlier one has become.
        """
        block, attention = self.block_name(index), self.architecture.attention
        networks = [ffn for group in self.ffn_groups(index) for ffn in group.members]
        return [
            [tuple(f"{block}.{name}" for name in attention.in_projections)],
            [(f"{block}.{attention.out_projection}",)],
            [ffn.in_projections for ffn in networks],
            [(ffn.out_projection,) for ffn in networks],
        ]

    @cached_property
    def linears(self) -> list[str]:
        """Plain names of all linears of all blocks, in order."""
        stages = (stage for index in range(self.block_count) for stage in self.linear_stages(index))
        return [name for stage in stages for group in stage for name in group]

    @cached_property
    def parameters(self) -> int:
        """Numbers that the weights stand for: low-bit linears count as what they unpack to, an adapter with its own."""
        if self.format is None:
            dense = self.checkpoint.parameters
        else:
            packed = [name for name in self.linears if self.is_low_bit(name)]
            inside = {tensor for name in packed for tensor in self.format.stored_tensors(self.stored_name(name))}
            unpacked = sum(math.prod(self.linear_shape(name)) for name in packed)
            dense = unpacked + sum(s.elements for name, s in self.checkpoint.tensors.items() if name not in inside)
        return dense + (self.adapter.parameters if self.adapter else 0)

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk, an adapter's included."""
        return self.checkpoint.bytes + (self.adapter.store.bytes if self.adapter else 0)

    @property
    def _most_experts(self) -> int:
        config = self.checkpoint.config
        return int(config.get("num_local_experts") or config.get("num_experts") or 0)

    def config_width(self, width_key: str) -> int:
        """The width that config.json states under this key."""
        multiples = dict(self.architecture.aliases)
        stated = self.checkpoint.config.get(width_key)
        if stated is None and width_key in multiples:
            return multiples[width_key] * self.hidden_size
        if not isinstance(stated, int):
            raise CheckpointError(f"{self.checkpoint.folder / 'config.json'}: no whole number under {width_key!r}")
        return stated


def bind(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Model:
    """Find the family of a checkpoint and check its tensors against its configuration.

    Raises:
        UnsupportedArchitecture: the family is not in the table.
        RequestError: the checkpoint brings code of its own, which was not allowed.
        CheckpointError: a tensor is missing or has another shape than the configuration says.
    """
    config_file = checkpoint.folder / "config.json"
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{config_file}: has no model_type; restore the file from its source")
    family = model_type.removeprefix(RAGGED_PREFIX)
    if "auto_map" in checkpoint.config and model_type == family and not trust_remote_code:
        raise RequestError(f"{config_file}: the model brings its own code (auto_map); read it, then pass --trust-remote-code")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UnsupportedArchitecture(
            f"{config_file}: unknown architecture {model_type!r}; known are {known}.{near_miss(family, ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[family]
    for key in (architecture.hidden_key, architecture.count_key, "vocab_size"):
        if not isinstance(checkpoint.config.get(key), int):
            raise CheckpointError(f"{config_file}: no whole number under {key!r}; restore the file from its source")
    model = Model(checkpoint, family, architecture, _removed_prefix(checkpoint, architecture), open_format(checkpoint))
    _check_shapes(model)
    return model


def with_adapter(model: Model, folder: Path | None) -> Model:
    """The model with the adapter of a folder added to its weights; None takes the one that lies in its own folder, if any.

    Raises RequestError where the adapter was made for another model.
    """
    own = model.checkpoint.folder / ADAPTER_FOLDER
    if folder is None and not own.is_dir():
        return model
    adapter = open_adapter(folder or own)
    linears = set(model.linears)
    for name in adapter.names:
        if name not in linears:
            raise RequestError(f"{adapter.folder}: updates {name}, which {model.checkpoint.folder} does not have")
        found = tuple(adapter.store.spec(n).shape[axis] for n, axis in zip(factor_names(name)[::-1], (0, 1), strict=True))
        if found != model.linear_shape(name):
            raise RequestError(
                f"{adapter.folder}: {name} is {list(found)} there, {list(model.linear_shape(name))} in "
                f"{model.checkpoint.folder}; use the adapter that was made for it"
            )
    return replace(model, adapter=adapter)


def open_model(folder: Path, trust_remote_code: bool = False) -> Model:
    """`open_checkpoint`, then `bind`."""
    return bind(open_checkpoint(folder), trust_remote_code)


def _removed_prefix(checkpoint: Checkpoint, architecture: Architecture) -> str:
    parts = architecture.blocks.split(".")
    for cut in range(len(parts)):
        if any(name.startswith(".".join(parts[cut:]) + ".0.") for name in checkpoint.tensors):
            return "".join(f"{part}." for part in parts[:cut])
    raise CheckpointError(
        f"{checkpoint.folder}: no tensor of {architecture.blocks}.0; is this the checkpoint of a language model?"
    )


def _check_shapes(model: Model) -> None:
    """Every block holds the same tensors, in the shapes that the configuration and the other blocks imply."""
    _check_ffn_shapes(model)
    if model.format is not None:
        return
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
    rows = model.checkpoint.config["vocab_size"]
    for name in (f"{model.architecture.embedding}.weight", f"{HEAD}.weight"):
        if model.has(name):
            spec = model.checkpoint.spec(model.stored_name(name))
            if spec.shape[0] != rows:
                raise _wrong_shape(model, spec.name, spec.shape, (rows, *spec.shape[1:]), "by vocab_size")


def _block_index(model: Model, name: str) -> list[str]:
    """[".3."] for a stored name inside block 3, [] outside the blocks."""
    prefix = model.architecture.blocks.removeprefix(model.removed_prefix) + "."
    number = name.removeprefix(prefix).split(".")[0]
    return [f".{number}."] if name.startswith(prefix) and number.isdigit() else []


def _check_ffn_shapes(model: Model) -> None:
    for index in range(model.block_count):
        for group in model.ffn_groups(index):
            stated = group.width if model.ragged else model.config_width(group.width_key)
            for ffn in group.members:
                _expect_linear(model, ffn.out_projection, (model.hidden_size, stated))
                for name in ffn.in_projections:
                    _expect_linear(model, name, (stated * group.fused, model.hidden_size))


def _expect_linear(model: Model, name: str, expected: tuple[int, int]) -> None:
    if not model.has(f"{name}.weight"):
        model.checkpoint.spec(model.stored_name(f"{name}.weight"))
    found = model.linear_shape(name)
    if found != expected:
        raise _wrong_shape(model, model.stored_name(f"{name}.weight"), found, expected, "(out, in) by config.json")
    if model.has(f"{name}.bias"):
        bias = model.checkpoint.spec(model.stored_name(f"{name}.bias"))
        if bias.shape != expected[:1]:
            raise _wrong_shape(model, bias.name, bias.shape, expected[:1], "by config.json")


def _wrong_shape(model: Model, name: str, found: tuple[int, ...], expected: tuple[int, ...], why: str) -> CheckpointError:
    file = model.checkpoint.file_of.get(name, model.checkpoint.folder)
    return CheckpointError(f"{file}: {name} has shape {list(found)}, expected {list(expected)} {why}; download it again")
