"""Map the tensors that a checkpoint stores to the modules of the stock network, as transformers does when it loads.

transformers renames tensors (`PrefixChange`, `WeightRenaming`) and converts some (`WeightConverter`: experts that are
stored one by one become one 3-D tensor). Names that are only renamed map one to one. Experts stored one by one map to
plain linears of our own (experts.py). Other conversions change values or shapes; their tensors are read as transformers
converts them, and no stage edits them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from compresskit.models.architectures import GATE, GATE_AND_UP, UP
from compresskit.models.experts import can_be_unpacked
from compresskit.models.weight_names import weight_names

EXPERT = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class StoredNames:
    """What the stored tensors of a checkpoint are in the network."""

    stored: dict[str, str] = field(default_factory=dict)
    """Stored name by plain name; experts by their own linears."""
    packed: dict[str, str] = field(default_factory=dict)
    """Stored name of the 3-D tensor by its parameter's name, of experts that can be unpacked."""
    separate: frozenset[str] = frozenset()
    """Paths of experts modules whose gate and up are stored apart."""
    converted: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Stored names by the name of the parameter that transformers makes of them."""
    separable: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Stored names of one expert's linears, with `{expert}`, that transformers reads in place of a packed tensor."""
    transposed: frozenset[str] = frozenset()
    """Parameters of packed experts whose stored matrices are the transposed ones."""
    by_shape: frozenset[str] = frozenset()
    """Those of them that transformers tells by their shape."""
    unknown: tuple[str, ...] = ()
    """Stored tensors that the network does not have."""


def stored_names(network: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> StoredNames:
    """Map stored names to those of a network as transformers builds it, its experts not unpacked. `shapes`: by stored name."""
    mapping = get_model_conversion_mapping(network)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    known = dict(network.state_dict(keep_vars=True))
    known |= dict(network.named_parameters(remove_duplicate=False)) | dict(network.named_buffers(remove_duplicate=False))
    experts = {name for name, module in network.named_modules() if can_be_unpacked(module)}
    found = StoredNames()
    separate, transposed, by_shape, unknown = set(), set(), set(), []
    for stored in weight_names(shapes):
        target, pattern = rename_source_key(stored, renamings, converters, network.base_model_prefix, known)
        module, _, leaf = target.rpartition(".")
        if target not in known:
            unknown.append(stored)
        elif pattern is None:
            if module in experts:
                found.packed[target] = stored
                found.separable.update(_separable(target, stored, converters))
            else:
                found.stored[target] = stored
        elif module in experts and _is_merge(by_pattern[pattern]):
            plain = _expert_linear(stored, module, leaf, by_pattern[pattern], pattern)
            found.stored[plain] = stored
            if plain.rsplit(".", 2)[1] == GATE:
                separate.add(module)
        elif module in experts and _is_transpose(by_pattern[pattern]):
            found.packed[target] = stored
            # Some conversions only swap the axes if the shapes ask for it.
            checked = all(getattr(each, "check_dims", False) for each in by_pattern[pattern].operations)
            if not checked or shapes.get(stored) != tuple(known[target].shape):
                transposed.add(target)
                by_shape |= {target} if checked else set()
        else:
            for name in _targets(by_pattern[pattern], target, known):
                found.converted[name] = (*found.converted.get(name, ()), stored)
    names = found.stored, found.packed, frozenset(separate), found.converted, found.separable
    return StoredNames(*names, frozenset(transposed), frozenset(by_shape), tuple(unknown))


def _is_merge(converter: WeightConverter) -> bool:
    """Whether a conversion only stacks experts, and joins gate and up."""
    kinds = [type(operation) for operation in converter.operations]
    return MergeModulelist in kinds and all(kind in (MergeModulelist, Concatenate) for kind in kinds)


def _separable(target: str, stored: str, converters: list[WeightConverter]) -> dict[str, tuple[str, ...]]:
    """The stored names of one expert's linears from which transformers also makes the packed tensor `target`; {} if none."""
    for each in converters:
        made = each.target_patterns[0]
        plain = all("*" in pattern and "\\" not in pattern for pattern in each.source_patterns)
        if _is_merge(each) and plain and target.endswith(made) and stored.endswith(made):
            head = stored.removesuffix(made)
            return {target: tuple(head + pattern.replace("*", "{expert}") for pattern in each.source_patterns)}
    return {}


def _is_transpose(converter: WeightConverter) -> bool:
    """Whether a conversion only swaps the axes of every expert's matrix."""
    operations: list[Any] = list(converter.operations)
    return all(isinstance(each, Transpose) and {each.dim0, each.dim1} in ({1, 2}, {-1, -2}) for each in operations)


def _expert_linear(stored: str, module: str, leaf: str, converter: WeightConverter, pattern: str) -> str:
    """Plain name of an expert's tensor, by its number and by which source of the conversion it is."""
    numbers = EXPERT.findall(stored)
    order = list(converter.source_patterns).index(pattern)
    bias = leaf.endswith("_bias") or stored.endswith(".bias")
    name = leaf.removesuffix("_bias")
    if len(converter.source_patterns) > 1 and name == GATE_AND_UP:
        name = (GATE, UP)[order]
    return f"{module}.{numbers[-1]}.{name}.{'bias' if bias else 'weight'}"


def _targets(converter: WeightConverter, target: str, known: dict[str, Any]) -> list[str]:
    """All parameters that a conversion makes of one tensor: the first stands for the others in the renamed key."""
    first = converter.target_patterns[0]
    names = [target.replace(first, each) for each in converter.target_patterns]
    return [name for name in names if name in known] or [target]


def converted(network: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that transformers makes of these stored tensors, all those of one conversion."""
    mapping = get_model_conversion_mapping(network)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    chosen: Any = None
    target = ""
    for stored, tensor in tensors.items():
        target, pattern = rename_source_key(stored, renamings, converters)
        assert pattern is not None
        chosen = by_pattern[pattern]
        chosen.add_tensor(target, stored, pattern, tensor)
    found = chosen.convert(target, model=network, config=network.config)
    return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}
