"""An opened checkpoint of a known family: names, feed-forward networks and shapes.

Does not import torch, so a checkpoint that contradicts its configuration is refused in under a second.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError
from compresskit.formats import Format
from compresskit.formats.peft import Adapter
from compresskit.models.architectures import RAGGED_PREFIX, Architecture

BITS_PER_BYTE = 8
EXPERT_KEYS = ("num_local_experts", "num_experts")
"""Keys of config.json with the number of experts of a block."""


@dataclass(frozen=True)
class Ffn:
    """Linears of one feed-forward network (or one expert), by plain name; they share their channels."""

    in_projections: tuple[str, ...]
    out_projection: str


@dataclass(frozen=True)
class FfnGroup:
    """Feed-forward networks of one block that must have equal width: one network, or all experts of a block."""

    block: int
    width_key: str
    width: int
    fused: int
    members: tuple[Ffn, ...]


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

    @property
    def ragged(self) -> bool:
        """Whether the block widths come from `block_configs` (the ragged layout)."""
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
        """Whether the weights are stored in low bits."""
        return self.checkpoint.config.get("quantization_config") is not None

    def block_name(self, index: int) -> str:
        """Module path of a block."""
        return f"{self.architecture.blocks}.{index}"

    def stored_name(self, name: str) -> str:
        """Map a plain name to the name in the checkpoint."""
        architecture = self.architecture
        inside = name.startswith(architecture.blocks + ".")
        for plain, stored in architecture.renames if inside else architecture.outer_renames:
            name = name.replace(plain, stored)
        return name.removeprefix(self.removed_prefix)

    def has(self, name: str) -> bool:
        """Whether the checkpoint stores the tensor with this plain name, in any form."""
        return self.stored_name(name) in self.checkpoint.tensors or self.is_low_bit(name.removesuffix(".weight"))

    def is_low_bit(self, name: str) -> bool:
        """Whether the linear with this plain name is stored in low bits."""
        return self.format is not None and self.format.holds(self.stored_name(name))

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the linear with this plain name."""
        if self.format is not None and self.is_low_bit(name):
            return self.format.shape(self.stored_name(name))
        rows, columns = self.checkpoint.matrix_shape(self.stored_name(f"{name}.weight"))
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

    def linear_sequence(self, index: int) -> list[list[tuple[str, ...]]]:
        """Linears of block `index` in compute order. Later positions see the edits of earlier ones.

        Returns:
            Positions of groups of plain names; the linears of a group share their input. The four positions are attention inputs,
            attention output, and the inputs and outputs of all feed-forward networks (experts together).
        """
        block, attention = self.block_name(index), self.architecture.attention
        networks = [ffn for group in self.ffn_groups(index) for ffn in group.members]
        return [
            [tuple(f"{block}.{name}" for name in attention.in_projections)],
            [(f"{block}.{attention.out_projection}",)],
            [ffn.in_projections for ffn in networks],
            [(ffn.out_projection,) for ffn in networks],
        ]

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
        stored = sum(spec.bytes for store in stores for spec in store.tensors.values())
        return BITS_PER_BYTE * stored / (self.parameters - (self.adapter.parameters if self.adapter else 0))

    @property
    def weight_dtype(self) -> str:
        """Dtype of the blocks' linears in a dense model, as safetensors names it."""
        return self.checkpoint.spec(self.stored_name(f"{self.linears[0]}.weight")).dtype

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk, including an adapter's."""
        return self.checkpoint.bytes + (self.adapter.store.bytes if self.adapter else 0)

    @property
    def _most_experts(self) -> int:
        return max((int(self.checkpoint.config.get(key) or 0) for key in EXPERT_KEYS), default=0)

    def config_width(self, width_key: str) -> int:
        """Return the width under this key of config.json; raises CheckpointError if it is not a whole number."""
        multiples = dict(self.architecture.aliases)
        stated = self.checkpoint.config.get(width_key)
        if stated is None and width_key in multiples:
            return multiples[width_key] * self.hidden_size
        if type(stated) is not int:
            found = f"{self.checkpoint.folder / 'config.json'}: {width_key} is {shown(stated)}"
            raise CheckpointError(f"{found}, expected a whole number; restore the file from its source")
        return stated
