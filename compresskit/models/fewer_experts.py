"""A model with fewer experts in every block: its config.json, and the names and shapes of its tensors.

The key of config.json with the number of experts is one of a few; which one the family reads is seen by building the stock
network with the new number. Whatever changes its shape then has an entry an expert: the router's rows and biases, and in some
families a correction or a scale. Both networks have shapes and no weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from compresskit.checkpoint.reader import TensorSpec
from compresskit.checkpoint.small_files import first_line
from compresskit.errors import UnsupportedArchitecture
from compresskit.models.architectures import REPLACED_EXPERTS
from compresskit.models.fewer_blocks import text_configuration, with_text_values
from compresskit.models.model import EXPERT_NUMBER, FfnGroup, Model, is_expert

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")
"""Keys of config.json with the number of experts of a block."""
CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "num_selected_experts",
)
"""Keys with the number of experts that a token gets."""
GROUPS, GROUPS_OF_A_TOKEN = ("n_group", "num_expert_group"), ("topk_group",)
"""Keys with the number of equal groups that the router chooses from first, and of how many a token may take experts."""
FEWEST_OF_A_GROUP = 2
"""A group-limited router adds up the two best scores of each group."""
LEAVES = ("weight", "bias")


def experts_group(model: Model, index: int) -> FfnGroup | None:
    """The experts of block `index`, None if it has none."""
    return next((group for group in model.ffn_groups(index) if is_expert(group.members[0].out_projection)), None)


def blocks_with_experts(model: Model) -> list[int]:
    """Numbers of the blocks that have experts."""
    return [index for index in range(model.block_count) if experts_group(model, index) is not None]


def experts_path(model: Model, index: int) -> str:
    """Module path of the experts of a block that has some, inside the block."""
    group = experts_group(model, index)
    assert group is not None
    name = group.members[0].out_projection.removeprefix(model.block_name(index) + ".")
    match = EXPERT_NUMBER.search(f".{name}")
    assert match is not None
    return name[: match.start(1) - 2]


def linears_of(model: Model, index: int) -> list[tuple[str, ...]]:
    """Plain names of the linears of each expert of a block, its output projection last."""
    group = experts_group(model, index)
    return [(*ffn.in_projections, ffn.out_projection) for ffn in group.members] if group else []


def experts_count(model: Model) -> int:
    """Count the experts of a block.

    Returns:
        Their number, the same in every block that has any.

    Raises:
        UnsupportedArchitecture: there are none in a form that can be taken apart, or blocks have different numbers.
    """
    if model.family in REPLACED_EXPERTS:
        raise UnsupportedArchitecture(f"{model.family}: holds its experts in a form of its own; prune its blocks instead")
    counts = {len(linears_of(model, index)) for index in blocks_with_experts(model)}
    if not counts:
        raise UnsupportedArchitecture(
            f"{model.checkpoint.folder}: {model.family} has no experts that can be removed; prune its channels or blocks instead"
        )
    if len(counts) > 1:
        raise UnsupportedArchitecture(
            f"{model.family}: its blocks have {' and '.join(map(str, sorted(counts)))} experts, and one number stands for all; "
            "prune its channels instead"
        )
    return counts.pop()


def stated(model: Model, keys: Collection[str]) -> int | None:
    """The first whole number that a model's configuration has under one of these keys, defaults included."""
    values = text_configuration(model).values
    return next((values[key] for key in keys if type(values.get(key)) is int), None)


def chosen_count(model: Model) -> int:
    """The number of experts that a token gets; raises UnsupportedArchitecture if no key states it."""
    found = stated(model, CHOSEN)
    if found is None:
        raise UnsupportedArchitecture(f"{model.family}: no key of config.json says how many experts a token gets")
    return found


def router_groups(model: Model) -> tuple[int, int]:
    """(number of equal groups of experts, of how many of them a token may take experts); (1, 1) for a plain router."""
    groups = stated(model, GROUPS) or 1
    return (groups, stated(model, GROUPS_OF_A_TOKEN) or groups) if groups > 1 else (1, 1)


def configuration(model: Model, kept: int) -> dict[str, Any]:
    """Change the number of experts in config.json.

    Returns:
        The file of the model with `kept` experts in every block.

    Raises:
        UnsupportedArchitecture: no key of it has the number of experts.
    """
    count, (prefix, written, values) = experts_count(model), text_configuration(model)
    # A file may hold another spelling of the key than its class does: those that are written are changed.
    found = [key for key in COUNTS if written.get(key) == count] or [key for key in COUNTS if values.get(key) == count]
    if not found:
        raise UnsupportedArchitecture(
            f"{model.family}: no key of config.json states its number of experts, {count}; prune its channels instead"
        )
    return with_text_values(model, prefix, dict.fromkeys(found, kept))


@lru_cache(maxsize=8)
def _shapes(config: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters and stored buffers of the stock network of a config.json."""
    import json
    from pathlib import Path

    from compresskit.checkpoint.reader import Checkpoint
    from compresskit.checkpoint.stock import quiet
    from compresskit.models.network import build_network, configuration_of

    with quiet():
        network = build_network(configuration_of(Checkpoint(Path(), json.loads(config), {}, {})))
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def by_expert(model: Model, kept: int) -> dict[str, int]:
    """Find the tensors beside the experts that have an entry an expert.

    Returns:
        Plain name -> the axis of the experts.

    Raises:
        UnsupportedArchitecture: the stock network with `kept` experts differs in anything else, or cannot be built.
    """
    import json

    count, remedy = experts_count(model), "its experts cannot be removed; prune its channels instead"
    if kept == count:
        return {}
    before = _shapes(json.dumps(model.checkpoint.config))
    try:
        after = _shapes(json.dumps(configuration(model, kept)))
    except UnsupportedArchitecture:
        raise
    except Exception as error:  # transformers raises errors of every kind
        raise UnsupportedArchitecture(
            f"{model.family}: makes no network with {kept} experts ({first_line(error)}); {remedy}"
        ) from error
    paths = tuple(f"{model.block_name(index)}.{experts_path(model, index)}." for index in blocks_with_experts(model))
    ours = {name: shape for name, shape in before.items() if not name.startswith(paths)}
    theirs = {name: shape for name, shape in after.items() if not name.startswith(paths)}
    followed = all(after.get(name) != shape for name, shape in before.items() if name.startswith(paths) and len(shape) > 1)
    if ours.keys() != theirs.keys() or not followed:
        raise UnsupportedArchitecture(
            f"{model.family}: does not follow its key of config.json with the number of experts; {remedy}"
        )
    converted = {name for name, _ in model.architecture.converted}
    blocks = tuple(f"{model.block_name(index)}." for index in blocks_with_experts(model))
    found = {}
    for name, shape in ours.items():
        if shape == theirs[name]:
            continue
        axes = [axis for axis, size in enumerate(shape) if size == count and size != theirs[name][axis]]
        cut = [*shape[: axes[0]], kept, *shape[axes[0] + 1 :]] if len(axes) == 1 else None
        if cut != list(theirs[name]) or name in converted or not name.startswith(blocks):
            raise UnsupportedArchitecture(f"{model.family}: {name} depends on the number of experts in its own way; {remedy}")
        found[name] = axes[0]
    return found


def router_linear(model: Model, axes: Mapping[str, int], index: int) -> str:
    """Find the one linear with a row an expert among the tensors of `by_expert`.

    Returns:
        Its module path inside block `index`.

    Raises:
        UnsupportedArchitecture: there is none, or more than one.
    """
    prefix = f"{model.block_name(index)}."
    found = [
        name.removeprefix(prefix)
        for name, axis in axes.items()
        if name.startswith(prefix) and name.endswith(".weight") and axis == 0
        and len(model.checkpoint.spec(model.stored_name(name)).shape) > 1
    ]  # fmt: skip
    if len(found) != 1:
        raise UnsupportedArchitecture(
            f"{model.family}: has no one matrix with a row an expert, by which experts could be compared; pass `prune reap`"
        )
    return found[0].removesuffix(".weight")


def stored_by_expert(model: Model, axes: Mapping[str, int]) -> dict[str, int]:
    """Stored name -> axis of the experts, of the tensors of `by_expert` that the checkpoint holds."""
    return {stored: axis for name, axis in axes.items() if (stored := model.stored_name(name)) in model.checkpoint.tensors}


def remaining_tensors(model: Model, kept: int) -> list[TensorSpec]:
    """Every tensor of the model with `kept` experts in every block, numbered from 0, in the source's order."""
    gone: set[str] = set()
    cut = stored_by_expert(model, by_expert(model, kept))
    for index in blocks_with_experts(model):
        for expert, names in enumerate(linears_of(model, index)):
            for name in (f"{linear}.{leaf}" for linear in names for leaf in LEAVES):
                part = model.packed(name)
                if part is not None:
                    cut[part.stored] = 0
                elif expert >= kept:
                    gone.add(model.stored_name(name))
    specs = []
    for name, spec in model.checkpoint.tensors.items():
        if name in cut:
            shape = list(spec.shape)
            shape[cut[name]] = kept
            specs.append(replace(spec, shape=tuple(shape)))
        elif name not in gone:
            specs.append(spec)
    return specs


def check_all_known(model: Model) -> None:
    """Look for stored experts that belong to none of the model's blocks.

    Blocks that predict further tokens lie after the last one; no stock model of transformers reads them, other readers do.

    Raises:
        UnsupportedArchitecture: there are some, and they would keep the old number.
    """
    known = {model.stored_name(f"{linear}.{leaf}") for i in range(model.block_count) for names in linears_of(model, i)
             for linear in names for leaf in LEAVES}  # fmt: skip
    known |= {part.stored for i in range(model.block_count) for names in linears_of(model, i) for linear in names
              for leaf in LEAVES if (part := model.packed(f"{linear}.{leaf}"))}  # fmt: skip
    for name in model.checkpoint.tensors:
        if ".experts." in name and name not in known:
            raise UnsupportedArchitecture(
                f"{model.checkpoint.folder}: {name} is of an expert of none of the {model.block_count} blocks, and would keep "
                "the old number of experts; remove such tensors from the checkpoint"
            )
