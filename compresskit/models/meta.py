"""The model without weights: stock modules on the meta device, in plain form, filled tensor by tensor.

In plain form, every compressible weight is an `nn.Linear` of shape (out, in). GPT-2's transposed Conv1D becomes a linear,
and 3-D expert weights become one set of linears per expert. `read_plain` and `to_stored` convert between plain weights
and stored tensors; both only transpose, so they preserve all bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresskit.checkpoint.small_files import first_line
from compresskit.checkpoint.stock import quiet
from compresskit.errors import CheckpointError
from compresskit.models.architectures import DOWN, GATE, GATE_AND_UP, UP
from compresskit.models.experts import can_be_unpacked, unpacked
from compresskit.models.model import FfnGroup, Model
from compresskit.models.names import converted
from compresskit.models.network import META, build_network, configuration_of

UNPACKING = ("cpu", "cuda")
"""Devices on which every low-bit format is unpacked."""


def build(model: Model, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Build the stock causal language model in plain form, without weights.

    Returns:
        The model in evaluation mode: parameters on the meta device, buffers on the CPU as in a model that is loaded in `dtype`.

    Raises:
        CheckpointError: a required tensor is missing or has another shape, or transformers does not take the configuration.
    """
    try:
        with quiet():
            network = build_network(configuration_of(model.checkpoint, trust_remote_code), trust_remote_code, dtype)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises errors of every kind
        file = model.checkpoint.folder / "config.json"
        raise CheckpointError(f"{file}: makes no model ({first_line(error)}); restore the file from its source") from error
    _to_plain(model, network)
    for index in range(model.block_count):
        for group in model.ffn_groups(index):
            resize(network, model, group)
    _check_complete(model, network)
    return network


def _to_plain(model: Model, network: nn.Module) -> None:
    for index in range(model.block_count):
        block = network.get_submodule(model.block_name(index))
        for name, module in list(block.named_modules()):
            if isinstance(module, Conv1D):
                inputs, outputs = module.weight.shape
                block.set_submodule(name, nn.Linear(inputs, outputs, bias=module.bias is not None, device=META))
            elif can_be_unpacked(module) and _experts_are_read(model, f"{model.block_name(index)}.{name}"):
                fused = not model.has(f"{model.block_name(index)}.{name}.0.{GATE}.weight")
                block.set_submodule(name, unpacked(module, fused, META))


def _experts_are_read(model: Model, path: str) -> bool:
    """Whether the checkpoint holds these experts in a form that maps to plain linears."""
    return any(model.has(f"{path}.0.{name}.weight") for name in (DOWN, GATE, UP, GATE_AND_UP))


def resize(network: nn.Module, model: Model, group: FfnGroup) -> None:
    """Resize feed-forward networks to the shapes in `model`, on the meta device; raises CheckpointError if it lacks a bias."""
    for ffn in group.members:
        for name in (*ffn.in_projections, ffn.out_projection):
            rows, columns = model.linear_shape(name)
            stock: Any = network.get_submodule(name)
            if stock.bias is not None and not model.has(f"{name}.bias"):
                raise _missing(model, f"{name}.bias")
            network.set_submodule(name, nn.Linear(columns, rows, model.has(f"{name}.bias"), device=META))


def _check_complete(model: Model, network: nn.Module) -> None:
    converted = {name for name, _ in model.architecture.converted}
    for name, parameter in network.named_parameters():
        if name in converted:
            continue
        if not model.has(name):
            if _is_tied(network, name, parameter) and is_outside(model, name):
                continue
            raise _missing(model, name)
        if model.is_low_bit(name.removesuffix(".weight")):
            continue  # `resize` and the shape check use the unpacked shape of such a linear
        part = model.packed(name)
        if part is not None:
            stored = found = model.linear_shape(name.rpartition(".")[0]) if parameter.ndim > 1 else tuple(parameter.shape)
        else:
            stored = model.checkpoint.spec(model.stored_name(name)).shape
            found = stored[::-1] if _is_transposed(model, name) else stored
        if found != tuple(parameter.shape):
            raise CheckpointError(
                f"{model.checkpoint.folder}: {model.stored_name(name)} has shape {list(stored)}, "
                f"its configuration asks for {list(parameter.shape)}; download it again"
            )


def _missing(model: Model, name: str) -> CheckpointError:
    # transformers fills a head that its configuration does not tie with random numbers.
    tied = ", or set tie_word_embeddings to true in config.json if the head is the embedding"
    remedy = f"download it again{tied if name == f'{model.architecture.head}.weight' else ''}"
    return CheckpointError(f"{model.checkpoint.folder}: tensor {model.stored_name(name)} is missing; {remedy}")


def _is_tied(network: Any, name: str, parameter: Tensor) -> bool:
    """Whether a tensor that the checkpoint lacks is one of another's names: the head's weight is the embedding's."""
    # The configuration class's own default holds where config.json does not say: transformers fills an untied head that is
    # not stored with random numbers.
    if name in network.all_tied_weights_keys:
        return True
    return bool(network.config.get_text_config().tie_word_embeddings) and parameter is _output_embedding(network)


def _output_embedding(network: Any) -> Tensor | None:
    head = network.get_output_embeddings()
    return None if head is None else head.weight


def _is_transposed(model: Model, name: str) -> bool:
    if not model.architecture.transposed or not name.endswith(".weight") or not name.startswith(model.architecture.blocks + "."):
        return False
    return name.removesuffix(".weight") in model.block_linears(model.block_of(name))


def read_plain(model: Model, name: str, device: torch.device | None = None) -> Tensor:
    """Read the weight with this plain name; low-bit weights are unpacked, adapters added.

    Returns:
        The weight (out, in), in its stored dtype: a low-bit one on the device, if that can unpack it, all others on the CPU.
    """
    linear = name.removesuffix(".weight")
    base = _read_base(model, name, device)
    if model.adapter is not None and name.endswith(".weight") and model.adapter.holds(linear):
        return base.float() + model.adapter.update(linear).to(base.device)
    return base


def _read_base(model: Model, name: str, device: torch.device | None) -> Tensor:
    linear = name.removesuffix(".weight")
    if model.format is not None and model.is_low_bit(linear):
        return model.format.read(model.stored_name(linear), device if device and device.type in UNPACKING else "cpu")
    part = model.packed(name)
    if part is not None:
        matrix = model.checkpoint.read_slice(part.stored, part.expert)
        return (matrix.T if part.transposed else matrix).chunk(part.parts)[part.part]
    tensor = model.checkpoint.read(model.stored_name(name))
    return tensor.T if _is_transposed(model, name) else tensor


def to_stored(model: Model, name: str, weight: Tensor) -> Tensor:
    """Inverse of `read_plain`: convert a weight (out, in) to the tensor that the checkpoint stores."""
    return weight.T if _is_transposed(model, name) else weight


def fill(
    model: Model, network: PreTrainedModel, prefix: str, device: torch.device, dtype: torch.dtype, images: bool = False
) -> None:
    """Read every parameter and stored buffer below the module `prefix` that is not there yet.

    "" stands for those outside the blocks, and outside the towers unless `images` are to run through these.
    """
    for name in wanted(model, network, prefix, images):
        _set(network, name, read_on(model, name, device, dtype))
    for parameters, stored in _conversions(model, prefix):
        read = {name: model.checkpoint.read(name) for name in stored}
        for name, tensor in converted(network, read).items():
            if name in parameters:
                _set(network, name, tensor.to(device=device, dtype=dtype).contiguous())
    _fill_buffers(model, network, prefix, device)
    if not prefix:
        _tie(model, network)


def wanted(model: Model, network: PreTrainedModel, prefix: str, images: bool = False) -> list[str]:
    """Plain names of the parameters below a module that are not read yet and that the checkpoint stores."""
    return [name for name, each in _parameters(model, network, prefix, images) if each.is_meta and model.has(name)]


def place(network: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give the network parameters that were read before, by plain name."""
    for name, tensor in weights.items():
        _set(network, name, tensor)


def read_on(model: Model, name: str, device: torch.device, dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """`read_plain` in this dtype on a device; from `pinned` memory the copy may still be under way on the current stream."""
    tensor = read_plain(model, name, device)
    if pinned and tensor.device.type == "cpu":
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=pinned).to(dtype).contiguous()


def _conversions(model: Model, prefix: str) -> list[tuple[set[str], tuple[str, ...]]]:
    """(parameters, stored tensors) of the conversions below a module; those outside the blocks for ""."""
    found: dict[tuple[str, ...], set[str]] = {}
    for name, stored in model.architecture.converted:
        inside = name.startswith(prefix + ".") if prefix else is_outside(model, name)
        if inside:
            found.setdefault(stored, set()).add(name)
    return [(names, stored) for stored, names in found.items()]


def _fill_buffers(model: Model, network: nn.Module, prefix: str, device: torch.device) -> None:
    """Read the stored buffers, and move all to the device; they keep their dtype."""
    module = network.get_submodule(prefix)
    for inner, buffer in list(module.named_buffers()):
        name = f"{prefix}.{inner}" if prefix else inner
        if not prefix and not is_outside(model, name):
            continue
        path, _, leaf = name.rpartition(".")
        owner = network.get_submodule(path)
        stored = model.has(name) and leaf not in owner._non_persistent_buffers_set
        value = model.checkpoint.read(model.stored_name(name)).to(buffer.dtype) if stored else buffer
        if not value.is_meta:
            owner._buffers[leaf] = value.to(device)


def is_outside(model: Model, name: str) -> bool:
    """Whether a plain name lies outside the blocks."""
    return not name.startswith(model.architecture.blocks + ".")


def towers(model: Model, network: nn.Module) -> tuple[str, ...]:
    """Paths of the parts that text does not run through (vision and audio towers), each with a dot at the end."""
    blocks = model.architecture.blocks + "."
    parts = [f"{name}." for name, module in network.named_modules() if name and isinstance(module, PreTrainedModel)]
    return tuple(part for part in parts if not blocks.startswith(part) and not part.startswith(blocks))


def empty(model: Model, network: nn.Module, prefix: str) -> None:
    """Free the parameters that `fill` read; they become meta tensors again."""
    for name, parameter in _parameters(model, network, prefix, images=True):
        _set(network, name, torch.empty_like(parameter, device=META))


def _parameters(model: Model, network: nn.Module, prefix: str, images: bool) -> list[tuple[str, nn.Parameter]]:
    if prefix:
        return [(f"{prefix}.{name}", p) for name, p in network.get_submodule(prefix).named_parameters()]
    # A tied head shares its weight with the embedding: `empty` must see both names, or the tensor stays alive.
    named, others = network.named_parameters(remove_duplicate=False), () if images else towers(model, network)
    return [(name, p) for name, p in named if is_outside(model, name) and not name.startswith(others)]


def _set(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    network.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tie(model: Model, network: Any) -> None:
    """Give the parameters outside the blocks that no file stores those that transformers ties them to."""
    for name, other in network.all_tied_weights_keys.items():
        if is_outside(model, name) and network.get_parameter(name).is_meta and not network.get_parameter(other).is_meta:
            _set(network, name, network.get_parameter(other))
    head = network.get_output_embeddings()
    if head is not None and head.weight.is_meta and not model.has(f"{model.architecture.head}.weight"):
        head.weight = network.get_input_embeddings().weight
