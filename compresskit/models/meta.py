"""The model without weights: stock modules on the meta device, in plain form, filled tensor by tensor.

In plain form, every compressible weight is an `nn.Linear` of shape (out, in). GPT-2's transposed Conv1D becomes a linear,
and 3-D expert weights become one set of linears per expert. `read_plain` and `to_stored` convert between plain weights
and stored tensors; both only transpose, so they preserve all bits.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresskit.checkpoint.foreign_code import without_foreign_code
from compresskit.checkpoint.small_files import first_line
from compresskit.checkpoint.stock import stock_config
from compresskit.errors import CheckpointError
from compresskit.models.architectures import ARCHITECTURES, HEAD
from compresskit.models.model import FfnGroup, Model

META = torch.device("meta")


class PlainExperts(nn.Module):
    """The experts of one block as plain linears, with the interface of transformers' 3-D experts."""

    def __init__(self, count: int, projections: dict[str, nn.Linear], names: tuple[str, str, str], act: nn.Module):
        """`projections`: a template linear per projection, by name, copied for each expert. `names`: gate, up, down."""
        super().__init__()
        for expert in range(count):
            self.add_module(str(expert), nn.ModuleDict({name: copy.deepcopy(p) for name, p in projections.items()}))
        self.count = count
        self.names = names
        self.act_fn = act

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden)."""
        result = torch.zeros_like(hidden_states)
        for expert in range(self.count):
            token, position = torch.where(top_k_index == expert)
            if token.numel() == 0:
                continue
            gate, up, down = (self.get_submodule(f"{expert}.{name}") for name in self.names)
            x = hidden_states[token]
            y = down(self.act_fn(gate(x)) * up(x)) * top_k_weights[token, position, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result


def build(model: Model, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the stock causal language model in plain form, without weights.

    Returns:
        The model in evaluation mode: parameters on the meta device, buffers on the CPU.

    Raises:
        CheckpointError: a required tensor is missing or has another shape, or transformers does not take the configuration.
    """
    network: PreTrainedModel
    try:
        with META:
            config, own_code = _stock_config(model, trust_remote_code), trust_remote_code and not model.ragged
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=own_code)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises errors of every kind
        file = model.checkpoint.folder / "config.json"
        raise CheckpointError(f"{file}: makes no model ({first_line(error)}); restore the file from its source") from error
    network.eval()
    _restore_buffers(network)
    _to_plain(model, network)
    for index in range(model.block_count):
        for group in model.ffn_groups(index):
            resize(network, model, group)
    _check_complete(model, network)
    return network


def _stock_config(model: Model, trust_remote_code: bool) -> Any:
    if not model.ragged:
        return stock_config(model.checkpoint.folder, trust_remote_code)
    ours = ("block_configs", "auto_map", "architectures", "model_type", "compresskit_ffn")
    stock = {key: value for key, value in model.checkpoint.config.items() if key not in ours}
    return AutoConfig.for_model(model.family, **without_foreign_code(stock))


def _restore_buffers(network: PreTrainedModel) -> None:
    """Initialise buffers that no file stores (rotary frequencies, embedding scales).

    The model's own `_init_weights` computes them; parameters are on the meta device, where this is free.
    """
    for module in network.modules():
        buffers = {name: buffer for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if buffers:
            network._init_weights(module)


def _to_plain(model: Model, network: nn.Module) -> None:
    for index in range(model.block_count):
        block = network.get_submodule(model.block_name(index))
        for name, module in list(block.named_modules()):
            if isinstance(module, Conv1D):
                inputs, outputs = module.weight.shape
                block.set_submodule(name, nn.Linear(inputs, outputs, bias=module.bias is not None, device=META))
        _unpack_experts(model, block)


def _unpack_experts(model: Model, block: nn.Module) -> None:
    path = model.architecture.experts
    if not path or not any(name == path for name, _ in block.named_modules()):
        return
    experts: Any = block.get_submodule(path)
    sublayer = next(s for s in ARCHITECTURES[model.family].ffns if "{expert}" in s.out_projection)
    gate, up, down = (name.rsplit(".", 1)[1] for name in (*sublayer.in_projections, sublayer.out_projection))
    # `resize` sets the shape of every linear later, so any width works here.
    templates = {name: nn.Linear(model.hidden_size, 1, bias=False, device=META) for name in (gate, up)}
    templates[down] = nn.Linear(1, model.hidden_size, bias=False, device=META)
    block.set_submodule(path, PlainExperts(int(experts.num_experts), templates, (gate, up, down), experts.act_fn))


def resize(network: nn.Module, model: Model, group: FfnGroup) -> None:
    """Resize a group of feed-forward networks to the shapes in `model`; their parameters become meta tensors."""
    for ffn in group.members:
        for name in (*ffn.in_projections, ffn.out_projection):
            rows, columns = model.linear_shape(name)
            network.set_submodule(name, nn.Linear(columns, rows, model.has(f"{name}.bias"), device=META))


def _check_complete(model: Model, network: nn.Module) -> None:
    for name, parameter in network.named_parameters():
        if not model.has(name):
            if model.checkpoint.config.get("tie_word_embeddings", True) and parameter is _output_embedding(network):
                continue
            raise CheckpointError(f"{model.checkpoint.folder}: tensor {model.stored_name(name)} is missing; download it again")
        if model.is_low_bit(name.removesuffix(".weight")):
            continue  # `resize` and the shape check use the unpacked shape of such a linear
        stored = model.checkpoint.spec(model.stored_name(name)).shape
        found = stored[::-1] if _is_transposed(model, name) else stored
        if found != tuple(parameter.shape):
            raise CheckpointError(
                f"{model.checkpoint.folder}: {model.stored_name(name)} has shape {list(stored)}, "
                f"its configuration asks for {list(parameter.shape)}; download it again"
            )


def _output_embedding(network: Any) -> Tensor | None:
    head = network.get_output_embeddings()
    return None if head is None else head.weight


def _is_transposed(model: Model, name: str) -> bool:
    if not model.architecture.transposed or not name.endswith(".weight"):
        return False
    parts = name.removeprefix(model.architecture.blocks + ".").split(".", 1)
    sublayers = (model.architecture.attention, *model.architecture.ffns)
    linears = [linear for sublayer in sublayers for linear in (*sublayer.in_projections, sublayer.out_projection)]
    return parts[-1].removesuffix(".weight") in linears


def read_plain(model: Model, name: str) -> Tensor:
    """Read the weight with this plain name, (out, in), in its stored dtype; low-bit weights are unpacked, adapters added."""
    linear = name.removesuffix(".weight")
    if model.adapter is not None and name.endswith(".weight") and model.adapter.holds(linear):
        return _read_base(model, name).float() + model.adapter.update(linear)
    return _read_base(model, name)


def _read_base(model: Model, name: str) -> Tensor:
    linear = name.removesuffix(".weight")
    if model.format is not None and model.is_low_bit(linear):
        return model.format.read(model.stored_name(linear))
    tensor = model.checkpoint.read(model.stored_name(name))
    return tensor.T if _is_transposed(model, name) else tensor


def to_stored(model: Model, name: str, weight: Tensor) -> Tensor:
    """Inverse of `read_plain`: convert a weight (out, in) to the tensor that the checkpoint stores."""
    return weight.T if _is_transposed(model, name) else weight


def fill(model: Model, network: nn.Module, prefix: str, device: torch.device, dtype: torch.dtype) -> None:
    """Read every parameter below the module `prefix` ("" for parameters outside the blocks)."""
    for name, parameter in _parameters(model, network, prefix):
        if parameter.is_meta and model.has(name):
            _set(network, name, read_plain(model, name).to(device=device, dtype=dtype).contiguous())
    if not prefix and not model.has(f"{HEAD}.weight"):
        _tie_head(network)


def empty(model: Model, network: nn.Module, prefix: str) -> None:
    """Free the parameters that `fill` read; they become meta tensors again."""
    for name, parameter in _parameters(model, network, prefix):
        _set(network, name, torch.empty_like(parameter, device=META))


def _parameters(model: Model, network: nn.Module, prefix: str) -> list[tuple[str, nn.Parameter]]:
    if prefix:
        return [(f"{prefix}.{name}", p) for name, p in network.get_submodule(prefix).named_parameters()]
    # A tied head shares its weight with the embedding: `empty` must see both names, or the tensor stays alive.
    named = network.named_parameters(remove_duplicate=False)
    return [(name, parameter) for name, parameter in named if not name.startswith(model.architecture.blocks + ".")]


def _set(network: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    network.get_submodule(path)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


def _tie_head(network: Any) -> None:
    head = network.get_output_embeddings()
    if head is not None and head.weight.is_meta:
        head.weight = network.get_input_embeddings().weight
