"""The derived structure of one checkpoint as an `Architecture`.

derivation.py follows the tensors through the blocks, names.py maps the stored tensors; here both become the description
that stages use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.small_files import first_line
from compresskit.checkpoint.stock import quiet
from compresskit.errors import CheckpointError, CompresskitError
from compresskit.models.architectures import GATE, GATE_AND_UP, UP, Architecture, BlockStructure, Packed, Sizes, Sublayer
from compresskit.models.derivation import (
    BlockTrace,
    common_module,
    experts_inside,
    ffns_of,
    is_linear,
    positions_of,
)
from compresskit.models.experts import PACKED, PlainExperts
from compresskit.models.names import StoredNames, stored_names
from compresskit.models.network import build_network, check_decoder, configuration_of
from compresskit.models.tracing import blocks_path, kinds_of, make_fake, traced, unpack_experts
from compresskit.models.width_keys import with_width_keys

PLACEHOLDER = "{expert}"
NO_ATTENTION = Sublayer((), "")


def derive(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Architecture:
    """Find the structure of a checkpoint's model from its stock network.

    Returns:
        The structure, with all fields of `Architecture` that are for derived ones.

    Raises:
        CheckpointError: transformers makes no model of the configuration.
        CompresskitError: an UnsupportedArchitecture, where the network is no causal language model that can be walked block
            by block; the reason names the module.
    """
    file = checkpoint.folder / "config.json"
    try:
        with quiet():
            config = configuration_of(checkpoint, trust_remote_code)
            check_decoder(config, file)
            network = build_network(config, trust_remote_code)
    except CompresskitError:
        raise
    except Exception as error:  # transformers raises errors of every kind
        raise CheckpointError(f"{file}: makes no model ({first_line(error)}); restore the file from its source") from error
    names = stored_names(network, {name: spec.shape for name, spec in checkpoint.tensors.items()})
    blocks = blocks_path(network, file)
    structure = _structure(network, blocks, names, file)
    return with_width_keys(structure, network, config, trust_remote_code)


def _structure(network: PreTrainedModel, blocks: str, names: StoredNames, file: Any) -> Architecture:
    modules: Any = network.get_submodule(blocks)
    kind_of, first = kinds_of(modules)
    separate = names.separate | {name.rpartition(".")[0] for name, parts in names.separable.items() if len(parts) > 1}
    linears = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make_fake(network)
        unpack_experts(network, blocks, separate)
        traces = traced(network, modules, kind_of, first, file)
    kinds = [_block_structure(modules[i], f"{blocks}.{i}", traces[n], names) for n, i in enumerate(first)]
    stored_blocks = _stored_blocks(blocks, names)
    outer = {plain: stored for plain, stored in names.stored.items() if not plain.startswith(blocks + ".")}
    embedding, head = _name_of(network, network.get_input_embeddings()), _name_of(network, network.get_output_embeddings())
    embedded: Any = network.get_input_embeddings()
    experts = max((each.total for each in network.modules() if isinstance(each, PlainExperts)), default=0)
    rows, hidden = embedded.weight.shape
    hidden = next((trace.hidden for trace in traces if trace.hidden), int(hidden))
    config = network.config
    text = config.get_text_config()
    return Architecture(
        blocks=blocks, attention=NO_ATTENTION, ffns=(), embedding=embedding, head=head,
        transposed=any(isinstance(module, Conv1D) for module in modules.modules()),
        sizes=Sizes(hidden, len(modules), int(getattr(text, "vocab_size", rows)), experts),
        kinds=tuple(kinds), kind_of=tuple(kind_of), stored_blocks=stored_blocks, outer_names=tuple(outer.items()),
        dense_linears=tuple(name for name in linears if not _is_edited(name, blocks, kind_of, kinds)),
        converted=tuple((name, tuple(stored)) for name, stored in names.converted.items()),
        classes=_stock_classes(type(config).__name__, type(network.base_model).__name__, type(network).__name__),
    )  # fmt: skip


def _stock_classes(configuration: str, base: str, whole: str) -> tuple[str, str, str]:
    """The names of a network's classes, if transformers has them; empty for a checkpoint's own code."""
    names = (configuration, base, whole)
    return names if all(hasattr(transformers, name) for name in names) else ("", "", "")


def _is_edited(name: str, blocks: str, kind_of: list[int], kinds: list[BlockStructure]) -> bool:
    """Whether a linear of the network is among those that stages edit."""
    if not name.startswith(blocks + "."):
        return False
    index, _, inner = name.removeprefix(blocks + ".").partition(".")
    return any(inner in group for position in kinds[kind_of[int(index)]].positions for group in position)


def _stored_blocks(blocks: str, names: StoredNames) -> str:
    """Stored path of the list of blocks."""
    for plain, stored in [*names.stored.items(), *names.packed.items()]:
        if plain.startswith(f"{blocks}.0."):
            head, dot, _ = stored.partition(".0.")
            if dot:
                return head
    return blocks


def _block_structure(block: nn.Module, path: str, trace: BlockTrace, names: StoredNames) -> BlockStructure:
    inside = {
        _template(plain.removeprefix(path + ".")): stored
        for plain, stored in names.stored.items()
        if plain.startswith(path + ".")
    }
    inner = {plain: _template_of_stored(plain, _inside_stored(stored)) for plain, stored in inside.items()}
    packed, separable = _packed(block, path, names)
    inner |= separable
    packed_linears = {each.plain.rpartition(".")[0] for each in packed if each.plain not in separable}
    called: dict[str, int] = {}
    for call in trace.calls:
        called[call.name] = called.get(call.name, 0) + 1
    outputs = {call.name: call.outputs for call in trace.calls}
    reasons: dict[str, str] = {}
    usable: set[str] = set()
    for name, module in block.named_modules():
        if not isinstance(getattr(module, "weight", None), Tensor) or module.weight.ndim < 2:
            continue
        template = _template(name)
        if not is_linear(module):
            reasons[template] = f"{type(module).__name__} is no plain linear"
        elif called.get(name, 0) != 1:
            reasons[template] = "is not called as a module" if name not in called else "is called more than once"
        elif name in trace.routers or outputs[name] == 1:
            reasons[template] = "routes tokens"
        elif f"{template}.weight" not in inner and template not in packed_linears:
            reasons[template] = "is stored in another form"
        else:
            usable.add(name)
    # Experts first, as in the rows of the table: manifests count the networks of a block in this order.
    ffns = sorted(ffns_of(trace, usable), key=lambda ffn: PLACEHOLDER not in _template(ffn.out_projection))
    editable = {name for name in usable if _template(name) not in packed_linears}
    positions, mixer_positions = positions_of(trace, editable, ffns)
    reasons |= {_template(name): "its experts are stored as one tensor: they are pruned, not quantized"
                for name in usable if _template(name) in packed_linears}  # fmt: skip
    known = {*reasons, *(_template(name) for name in usable)}
    for name, parameter in block.named_parameters():
        module = _template(name).rpartition(".")[0]
        if parameter.ndim > 1 and module not in known and _template(name) not in reasons:
            reasons[_template(name)] = "is no weight of a linear"
    mixers = [name for position in positions[:mixer_positions] for group in position for name in group]
    return BlockStructure(
        positions=tuple(tuple(tuple(map(_template, group)) for group in position) for position in positions),
        ffns=tuple(_with_templates(ffn) for ffn in ffns),
        mixer=common_module(block, mixers), mixer_positions=mixer_positions, names=tuple(inner.items()), packed=packed,
        untouched=tuple(sorted(reasons.items())), tuple_length=trace.tuple_length, runs=trace.ran,
    )  # fmt: skip


def _with_templates(ffn: Sublayer) -> Sublayer:
    return replace(ffn, in_projections=tuple(map(_template, ffn.in_projections)), out_projection=_template(ffn.out_projection))


def _packed(block: nn.Module, path: str, names: StoredNames) -> tuple[tuple[Packed, ...], dict[str, str]]:
    """Where the tensors of experts lie that are stored as one tensor of all experts.

    Returns:
        (the places, stored name inside the block of each plain tensor that can also be stored expert by expert).
    """
    found: list[Packed] = []
    separable: dict[str, str] = {}
    for name, module in experts_inside(block).items():
        stock: Any = module._stock[0]
        for leaf in (*PACKED, *(f"{each}_bias" for each in PACKED)):
            target = f"{path}.{name}.{leaf}"
            stored = names.packed.get(target)
            if stored is None:
                continue
            linear, kind = leaf.removesuffix("_bias"), "bias" if leaf.endswith("_bias") else "weight"
            transposed = kind == "weight" and bool(stock.is_transposed) != (target in names.transposed)
            parts = [GATE, UP] if linear == GATE_AND_UP and not module.fused else [linear]
            for number, part in enumerate(parts):
                plain = f"{name}.{PLACEHOLDER}.{part}.{kind}"
                by_shape = kind == "weight" and target in names.by_shape
                found.append(Packed(plain, _inside_stored(stored), transposed, number, len(parts), by_shape))
                if target in names.separable:
                    separable[plain] = _inside_stored(names.separable[target][number])
    return tuple(found), separable


def _template(name: str) -> str:
    """Name of an expert's part with a placeholder for the expert's number."""
    head, dot, rest = name.partition(".experts.")
    if not dot and name.startswith("experts."):
        head, dot, rest = "", "experts.", name.removeprefix("experts.")
    number, _, leaf = rest.partition(".")
    return f"{head}{dot}{PLACEHOLDER}.{leaf}" if dot and number.isdecimal() else name


def _template_of_stored(plain: str, stored: str) -> str:
    """The stored counterpart of a template: its last number is the expert's."""
    if PLACEHOLDER not in plain:
        return stored
    parts = stored.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join([*parts[:last], PLACEHOLDER, *parts[last + 1 :]])


def _inside_stored(stored: str) -> str:
    """A stored name without what leads to the block's number, and the number."""
    parts = stored.split(".")
    number = next(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[number + 1 :])


def _name_of(network: nn.Module, module: Any) -> str:
    return next((name for name, each in network.named_modules() if each is module), "")
