"""The tensors of a model in a GGUF file: names, types, and how each is made when its turn comes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.errors import CheckpointError, NumericalError, UnsupportedArchitecture
from compresskit.exporting.gguf import blocks
from compresskit.exporting.gguf.blocks import BLOCK, Floats
from compresskit.exporting.gguf.families import Family
from compresskit.exporting.gguf.hyperparameters import heads_of, rope_factors
from compresskit.exporting.gguf.placement import Placement
from compresskit.exporting.planned import PlannedTensor
from compresskit.formats import whole_steps
from compresskit.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, BIAS = ".weight", ".bias"
NOT_READ = re.compile(r".*\.(attn\.bias|attn\.masked_bias|rotary_emb\.inv_freq)")
"""Constants that some checkpoints store: causal masks, frequencies."""
EMBEDDINGS = ("token_embd", "output")
IN_32_BITS = ("position_embd",)
"""What llama.cpp adds to other values and wants in float32."""
STORED_AS = {"F16": "F16", "BF16": "BF16"}
"""Types of dense weights; whatever else is stored is float32 here."""
ROUNDED_TO = "Q8_0"
"""Type of low-bit linears whose codes no block holds."""


@dataclass(frozen=True)
class Layout:
    """How a model lies in a GGUF file."""

    model: Model
    config: Any
    family: Family
    architecture: str
    weights: str
    """Type of dense linears; auto: as stored."""
    embedding: str
    """Type of the embedding and the head; auto: as stored."""

    @cached_property
    def widths(self) -> list[int]:
        """FFN width of every block in the file: its own, or the widest where the architecture has one for all."""
        own = [self.model.ffn_groups(index)[0].width for index in range(self.model.block_count)]
        return own if self.architecture == self.family.per_block else [max(own)] * len(own)

    @cached_property
    def names(self) -> Any:
        """The package's map from names of tensors to those in the file."""
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == self.architecture)
        return get_tensor_name_map(architecture, self.model.block_count)

    @cached_property
    def _widened(self) -> dict[str, dict[str, int]]:
        """Padding of the linears of feed-forward networks, by plain name."""
        found: dict[str, dict[str, int]] = {}
        for index, width in enumerate(self.widths):
            for group in self.model.ffn_groups(index):
                for ffn in group.members:
                    found |= {name: {"rows": width, "fused": group.fused} for name in ffn.in_projections}
                    found[ffn.out_projection] = {"columns": width}
        return found

    def placement(self, linear: str) -> Placement:
        """Where the linear, or other module, of this plain name goes; raises UnsupportedArchitecture if nowhere."""
        name = self.names.get_name(linear + WEIGHT, try_suffixes=(WEIGHT, BIAS))
        if name is None:
            raise UnsupportedArchitecture(
                f"{self.model.checkpoint.folder}: {linear} has no place in llama.cpp's {self.architecture}; export the model "
                "that it was added to"
            )
        name = name.removesuffix(WEIGHT)
        heads, kv_heads = heads_of(self.config)
        rotated = {"attn_q": heads, "attn_k": kv_heads} if self.family.paired else {}
        return Placement(name, rotated.get(name.rpartition(".")[2], 0), **self._widened.get(linear, {}))


def tensors(layout: Layout) -> list[PlannedTensor]:
    """Plan every tensor of a model, in the checkpoint's order; raises UnsupportedArchitecture for one without a place."""
    model = layout.model
    found = [_of_values(name, values) for name, values in rope_factors(layout.config).items()]
    for module, leaf in _parts(model):
        plain = module if module.startswith(model.removed_prefix) else model.removed_prefix + module
        tied = plain == model.architecture.head and layout.config.tie_word_embeddings
        if tied or NOT_READ.fullmatch(plain + leaf):
            continue
        found.append(_planned(layout, module, leaf, layout.placement(plain)))
    _check_head(layout, {tensor.name for tensor in found})
    return found


def _parts(model: Model) -> Iterable[tuple[str, str]]:
    """(module, leaf) of every tensor of the model by stored name, a low-bit weight counting as one."""
    given, stored = model.format, model.checkpoint.tensors
    modules = dict.fromkeys(name.rpartition(".")[0].removesuffix(WEIGHT) for name in stored)
    low_bit = [module for module in modules if given is not None and given.holds(module)]
    owners = {part: module for module in low_bit if given is not None for part in given.stored_tensors(module)}
    for name in stored:
        module, _, leaf = name.rpartition(".")
        if name not in owners:
            yield module, f".{leaf}"
        elif name == next(iter(given.stored_tensors(owners[name]) if given else ())):
            yield owners[name], WEIGHT


def _check_head(layout: Layout, names: set[str]) -> None:
    """Refuse a head that llama.cpp does not look for, or misses."""
    own = f"output{WEIGHT}" in names
    if layout.family.tied is not None and layout.family.tied == own:
        wanted = "the embedding as its head" if own else "a head of its own"
        raise UnsupportedArchitecture(f"{layout.model.checkpoint.folder}: llama.cpp's {layout.architecture} takes only {wanted}")


def _of_values(name: str, values: Floats) -> PlannedTensor:
    return PlannedTensor(name, values.shape, "F32", values.nbytes, lambda: (values, 0.0))


def _planned(layout: Layout, module: str, leaf: str, place: Placement) -> PlannedTensor:
    model = layout.model
    if model.format is not None and leaf == WEIGHT and model.format.holds(module):
        return _low_bit(layout, module, place)
    spec = model.checkpoint.spec(module + leaf)
    if len(spec.shape) != 2:
        length = place.shape((spec.shape[0], 0))[0] if leaf == BIAS else spec.shape[0]
        make = partial(_vector, layout, module + leaf, place if leaf == BIAS else Placement(place.name))
        return _typed(place.name + leaf, (length,), "F32", make)
    turned = model.architecture.transposed and place.name.startswith("blk.")
    shape = place.shape((spec.shape[1], spec.shape[0]) if turned else (spec.shape[0], spec.shape[1]))
    asked = layout.embedding if place.name in EMBEDDINGS else layout.weights
    kind = STORED_AS.get(spec.dtype, "F32") if asked == "auto" else asked.upper()
    kind = "F32" if place.name in IN_32_BITS else blocks.fitting(kind, shape[1])
    return _typed(place.name + leaf, shape, kind, partial(_dense, layout, module + leaf, place, kind, turned))


def _low_bit(layout: Layout, module: str, place: Placement) -> PlannedTensor:
    stored = layout.model.format
    assert stored is not None
    shape = place.shape(stored.shape(module))
    scheme = whole_steps.scheme_of(stored, module)
    kind = blocks.holding(*whole_steps.range_of(scheme)) if scheme else None
    columns = stored.shape(module)[1]
    whole = scheme is not None and scheme.fits(columns) and not (scheme.group_size or columns) % BLOCK and not shape[1] % BLOCK
    if whole and kind is not None:
        return _typed(place.name + WEIGHT, shape, kind, partial(_carried, layout, module, place, kind))
    kind = blocks.fitting(ROUNDED_TO if layout.weights == "auto" else layout.weights.upper(), shape[1])
    return _typed(place.name + WEIGHT, shape, kind, partial(_dense, layout, module, place, kind, False))


def _typed(name: str, shape: tuple[int, ...], kind: str, make: Callable[[], tuple[Any, float]]) -> PlannedTensor:
    return PlannedTensor(name, shape, kind, blocks.stored_bytes(kind, shape), make)


def _array(values: Tensor) -> Floats:
    found: Floats = values.float().numpy()
    return found


def _vector(layout: Layout, stored: str, place: Placement) -> tuple[Floats, float]:
    values = _array(layout.model.checkpoint.read(stored))
    offset = layout.family.norm_offset if stored.endswith("norm.weight") else 0.0
    return place.place_rows(values + np.float32(offset) if offset else values), 0.0


def _dense(layout: Layout, stored: str, place: Placement, kind: str, turned: bool) -> tuple[Any, float]:
    """A weight, or a low-bit linear as readers unpack it, in a type of dense weights."""
    model = layout.model
    low_bit = model.format is not None and model.format.holds(stored)
    values = model.format.read(stored) if model.format is not None and low_bit else model.checkpoint.read(stored)
    weight = _array(values.T.contiguous() if turned else values)
    weight = place.place_columns(place.place_rows(weight))
    made = blocks.rounded(kind, np.ascontiguousarray(weight))
    if kind == "F32":
        return made, 0.0
    found = blocks.restored(kind, made)
    if not np.isfinite(found).all():
        raise NumericalError(f"{stored}: holds {np.abs(weight).max():.3g}, which {kind} cannot; pass --weights f32")
    return made, blocks.relative_error(found, weight)


def _carried(layout: Layout, stored: str, place: Placement, kind: str) -> tuple[Any, float]:
    """A low-bit linear with its own codes."""
    assert layout.model.format is not None
    read, scale = (each.numpy() for each in whole_steps.read_steps(layout.model.format, stored))
    group = read.shape[1] // scale.shape[1]
    halves = scale.astype(np.float16)
    if not np.isfinite(halves).all():
        raise NumericalError(f"{stored}: a scale of {scale.max():.3g} is beyond half precision; export the dense checkpoint")
    error = blocks.scale_error(read, halves.astype(np.float32), scale)
    if read.min() < blocks.STEPS[kind][0] or read.max() > blocks.STEPS[kind][1]:
        raise CheckpointError(f"{stored}: holds zero points that a symmetric grid has not; correct quantization_config")
    steps = place.place_columns(place.place_rows(read))
    spread = place.place_rows(np.repeat(halves, group // BLOCK, axis=1))
    return blocks.packed(kind, steps, place.place_columns(spread, BLOCK)), error
