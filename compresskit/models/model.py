"""An opened checkpoint of a known family: names, feed-forward networks and shapes.

Does not import torch, so a checkpoint that contradicts its configuration is refused in under a second.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError
from compresskit.formats import Format
from compresskit.formats.peft import Adapter
from compresskit.models.architectures import RAGGED_PREFIX, Architecture

BITS_PER_BYTE = 8
EXPERT_KEYS = ("num_local_experts", "num_experts")
"""Keys of config.json with the number of experts of a block."""
PLACEHOLDER = "{expert}"
EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Ffn:
    """Linears of one feed-forward network (or one expert), by plain name; they share their channels."""

    in_projections: tuple[str, ...]
    out_projection: str


@dataclass(frozen=True)
class PackedPart:
    """One expert's matrix (or bias) inside a stored tensor of all experts."""

    stored: str
    expert: int
    transposed: bool
    part: int = 0
    parts: int = 1
    """Which of how many equal parts of the rows."""
    by_shape: bool = False
    """Whether transformers tells by the shape alone that the matrix is transposed."""


@dataclass(frozen=True)
class FfnGroup:
    """Feed-forward networks of one block that must have equal width: one network, or all experts of a block."""

    block: int
    width_key: str
    width: int
    fused: int
    members: tuple[Ffn, ...]
    interleaved: bool = False
    """Whether the rows of fused input projections alternate."""
    multiple: int = 1
    """Width per unit of the configuration key."""


@dataclass(frozen=True)
class Model:
    """An opened checkpoint of a known family."""

    checkpoint: Checkpoint
    family: str
    architecture: Architecture
    removed_prefix: str = ""
    """Prefix of plain names that this checkpoint omits (GPT-2 and OPT files on the Hub)."""
    format: Format | None = None
    """Storage format of the low-bit linears; None for a dense checkpoint."""
    adapter: Adapter | None = None
    """Low-rank adapter that belongs to the weights."""
    code: Mapping[str, str] = field(default_factory=dict)
    """Files of code that the checkpoint brings and the user trusts, by name."""

    @property
    def ragged(self) -> bool:
        """Whether the block widths come from `block_configs` (the ragged layout)."""
        return str(self.checkpoint.config.get("model_type", "")).startswith(RAGGED_PREFIX)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        sizes = self.architecture.sizes
        return sizes.hidden if sizes else int(self.checkpoint.config[self.architecture.hidden_key])

    @property
    def block_count(self) -> int:
        """Number of decoder blocks."""
        sizes = self.architecture.sizes
        return sizes.blocks if sizes else int(self.checkpoint.config[self.architecture.count_key])

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the embedding knows."""
        sizes = self.architecture.sizes
        return sizes.vocabulary if sizes else int(self.checkpoint.config["vocab_size"])

    @property
    def quantized(self) -> bool:
        """Whether the weights are stored in low bits."""
        return self.checkpoint.config.get("quantization_config") is not None

    def block_name(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.architecture.blocks}.{index}"

    def stored_name(self, name: str) -> str:
        """Map a plain name, of a tensor or of a linear without a leaf, to the name in the checkpoint."""
        architecture = self.architecture
        inside = name.startswith(architecture.blocks + ".")
        if architecture.derived:
            return self._derived_name(name, inside)
        for plain, stored in architecture.renames if inside else architecture.outer_renames:
            name = name.replace(plain, stored)
        return name.removeprefix(self.removed_prefix)

    def _derived_name(self, name: str, inside: bool) -> str:
        """`stored_name` by the names that the derivation found; a tensor that is not stored yet lies beside its weight."""
        if not inside:
            return self._outer_names.get(name, name)
        index, _, inner = name.removeprefix(self.architecture.blocks + ".").partition(".")
        prefix = f"{self.architecture.stored_blocks}.{index}."
        names = self._names_of_kind[self.architecture.kind_of[int(index)]]
        pattern, expert = _with_placeholder(inner)
        for template, number in ((inner, ""), (pattern, expert)):
            found = names.get(template)
            if found is not None:
                return prefix + found.replace(PLACEHOLDER, number)
            weight = names.get(f"{template}.weight")
            if weight is not None:
                return prefix + weight.removesuffix(".weight").replace(PLACEHOLDER, number)
            module, _, leaf = template.rpartition(".")
            weight = names.get(f"{module}.weight")
            if weight is not None and weight.endswith(".weight"):
                return f"{prefix}{weight.removesuffix('.weight').replace(PLACEHOLDER, number)}.{leaf}"
        return prefix + inner

    @cached_property
    def _outer_names(self) -> dict[str, str]:
        return dict(self.architecture.outer_names)

    @cached_property
    def _names_of_kind(self) -> list[dict[str, str]]:
        return [dict(kind.names) for kind in self.architecture.kinds]

    def stored_block_of(self, stored: str) -> int | None:
        """Index of the block to which a stored tensor belongs; None for tensors outside the blocks."""
        rest = stored.removeprefix(self.stored_blocks)
        number = rest.partition(".")[0]
        known = rest != stored and number.isdecimal() and int(number) < self.block_count
        return int(number) if known else None

    @property
    def stored_blocks(self) -> str:
        """Stored path of the list of blocks, with a dot at the end."""
        architecture = self.architecture
        return (architecture.stored_blocks or architecture.blocks.removeprefix(self.removed_prefix)) + "."

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores the tensor with this plain name, in any form."""
        stored = self.stored_name(name) in self.checkpoint.tensors
        return stored or self.is_low_bit(name.removesuffix(".weight")) or self.packed(name) is not None

    def packed(self, name: str) -> PackedPart | None:
        """Where the tensor with this plain name lies inside a stored 3-D tensor; None if it is a tensor of its own."""
        if not any(kind.packed for kind in self.architecture.kinds):
            return None
        index, _, inner = name.removeprefix(self.architecture.blocks + ".").partition(".")
        if not index.isdecimal():
            return None
        pattern, expert = _with_placeholder(inner)
        for each in self.architecture.block(int(index)).packed:
            stored = f"{self.architecture.stored_blocks}.{index}.{each.stored}"
            if each.plain == pattern and stored in self.checkpoint.tensors:
                return PackedPart(stored, int(expert), each.transposed, each.part, each.parts, each.by_shape)
        return None

    def spec_of(self, name: str) -> TensorSpec:
        """Spec of the stored tensor with this plain name, or of the one of all experts in which it lies."""
        part = self.packed(name)
        return self.checkpoint.spec(part.stored if part else self.stored_name(name))

    def is_low_bit(self, name: str) -> bool:
        """Whether the linear with this plain name is stored in low bits."""
        return self.format is not None and self.format.holds(self.stored_name(name))

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the linear with this plain name."""
        if self.format is not None and self.is_low_bit(name):
            return self.format.shape(self.stored_name(name))
        part = self.packed(f"{name}.weight")
        if part is not None:
            _, rows, columns = self.checkpoint.spec(part.stored).shape
            rows, columns = (columns, rows) if part.transposed else (rows, columns)
            return rows // part.parts, columns
        rows, columns = self.checkpoint.matrix_shape(self.stored_name(f"{name}.weight"))
        return (columns, rows) if self.architecture.transposed else (rows, columns)

    def ffn_groups(self, index: int) -> list[FfnGroup]:
        """The prunable feed-forward networks of block `index`."""
        return self._ffn_groups[index]

    @cached_property
    def _ffn_groups(self) -> list[list[FfnGroup]]:
        return [self._groups_of_block(index) for index in range(self.block_count)]

    def _groups_of_block(self, index: int) -> list[FfnGroup]:
        block, structure = self.block_name(index), self.architecture.block(index)
        groups = []
        for sublayer in structure.ffns:
            members = []
            names = (*sublayer.in_projections, sublayer.out_projection)
            for expert in self._experts_of(f"{block}.{sublayer.out_projection}"):
                *ins, out = (f"{block}.{name.replace(PLACEHOLDER, str(expert))}" for name in names)
                members.append(Ffn(tuple(ins), out))
            if members:
                width = self.linear_shape(members[0].out_projection)[1]
                kind = sublayer.fused, tuple(members), sublayer.interleaved, sublayer.multiple
                groups.append(FfnGroup(index, sublayer.width_key, width, *kind))
        if not groups and not self.architecture.derived:
            expected = self.stored_name(f"{block}.{structure.ffns[0].out_projection.replace(PLACEHOLDER, '0')}.weight")
            raise CheckpointError(f"{self.checkpoint.folder}: tensor {expected} is missing; download the checkpoint again")
        return groups

    def _experts_of(self, linear: str) -> range:
        """Numbers of the experts that have the linear with this template; one number for a linear that no expert has."""
        count = 0
        while count < (self._most_experts if PLACEHOLDER in linear else 1):
            if not self.has(f"{linear.replace(PLACEHOLDER, str(count))}.weight"):
                break
            count += 1
        return range(count)

    def block_of(self, name: str) -> int:
        """Index of the block that holds the linear with this plain name."""
        return int(name.removeprefix(self.architecture.blocks + ".").partition(".")[0])

    def linear_sequence(self, index: int) -> list[list[tuple[str, ...]]]:
        """Linears of block `index` in compute order. Later positions see the edits of earlier ones.

        Returns:
            Positions of groups of plain names; the linears of a group share their input. In a transformer's block the four
            positions are attention inputs, attention output, and the inputs and outputs of all feed-forward networks (experts
            together).
        """
        return self._sequences[index]

    @cached_property
    def _sequences(self) -> list[list[list[tuple[str, ...]]]]:
        return [self._sequence_of_block(index) for index in range(self.block_count)]

    def _sequence_of_block(self, index: int) -> list[list[tuple[str, ...]]]:
        block = self.block_name(index)
        found = []
        for position in self.architecture.block(index).positions:
            groups = []
            for group in position:
                names = [f"{block}.{name}" for name in group]
                experts = self._experts_of(names[0]) if any(PLACEHOLDER in n for n in names) or self._is_optional(group) else [0]
                groups += [tuple(name.replace(PLACEHOLDER, str(expert)) for name in names) for expert in experts]
            found.append(groups)
        return found

    def _is_optional(self, group: tuple[str, ...]) -> bool:
        """Whether blocks of this row may lack the group: a row lists all kinds of feed-forward networks."""
        row = self.architecture
        return (
            not row.derived
            and len(row.ffns) > 1
            and group[0] not in (*row.attention.in_projections, row.attention.out_projection)
        )

    def mixer_positions(self, index: int) -> int:
        """Number of leading positions of `linear_sequence` after whose edits the attention's outputs are final."""
        structure = self.architecture.block(index)
        return structure.mixer_positions if structure.mixer else len(structure.positions) + 1

    def block_linears(self, index: int) -> list[str]:
        """Plain names of the linears of one block, in compute order."""
        return [name for position in self.linear_sequence(index) for group in position for name in group]

    @cached_property
    def linears(self) -> list[str]:
        """Plain names of all linears of all blocks, in order."""
        return [name for index in range(self.block_count) for name in self.block_linears(index)]

    @cached_property
    def parameters(self) -> int:
        """Number of weights: low-bit linears count as unpacked, an adapter adds its own."""
        if self.format is None:
            dense = self.checkpoint.parameters
        else:
            packed = [name for name in self.linears if self.is_low_bit(name)]
            inside = {tensor for name in packed for tensor in self.format.stored_tensors(self.stored_name(name))}
            unpacked = sum(math.prod(self.linear_shape(name)) for name in packed)
            dense = unpacked + sum(s.elements for name, s in self.checkpoint.tensors.items() if name not in inside)
        return dense + (self.adapter.parameters if self.adapter else 0)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight: 32 or 16 for dense weights. An adapter adds bits but no weights."""
        stores = [self.checkpoint, *([self.adapter.store] if self.adapter else [])]
        stored = sum(store.stored_bytes for store in stores)
        return BITS_PER_BYTE * stored / (self.parameters - (self.adapter.parameters if self.adapter else 0))

    @property
    def weight_dtype(self) -> str:
        """Dtype of the blocks' linears in a dense model, as safetensors names it."""
        return self.spec_of(f"{self.linears[0]}.weight").dtype

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk, including an adapter's."""
        return self.checkpoint.bytes + (self.adapter.store.bytes if self.adapter else 0)

    @property
    def _most_experts(self) -> int:
        sizes = self.architecture.sizes
        return sizes.experts if sizes else max((int(self.checkpoint.config.get(key) or 0) for key in EXPERT_KEYS), default=0)

    def config_width(self, width_key: str) -> int:
        """Return the width under this key of config.json; raises CheckpointError if it is not a whole number."""
        if self.architecture.derived:
            return dict(self.architecture.widths)[width_key]
        multiples = dict(self.architecture.aliases)
        stated = config_value(self.checkpoint.config, width_key)
        if stated is None and width_key in multiples:
            return multiples[width_key] * self.hidden_size
        if type(stated) is not int:
            found = f"{self.checkpoint.folder / 'config.json'}: {width_key} is {shown(stated)}"
            raise CheckpointError(f"{found}, expected a whole number; restore the file from its source")
        return stated


def _with_placeholder(inner: str) -> tuple[str, str]:
    """Split the name of an expert's tensor into its template and the expert's number, "" for other tensors."""
    match = EXPERT_NUMBER.search(inner)
    if match is None:
        return inner, ""
    return f"{inner[: match.start(1)]}{PLACEHOLDER}{inner[match.end(1) :]}", match[1]


def is_expert(name: str) -> bool:
    """Whether a linear with this plain name belongs to one of several experts."""
    return EXPERT_NUMBER.search(name) is not None


def config_value(config: dict[str, Any], key: str) -> Any:
    """Value of a key of config.json; dots lead into configurations inside it (`text_config.intermediate_size`)."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def with_config_value(config: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A configuration with another value under a key, which may have dots (`config_value`)."""
    first, _, rest = key.partition(".")
    return config | {first: with_config_value(config.get(first) or {}, rest, value) if rest else value}
