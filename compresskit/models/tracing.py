"""Run a stock network once without memory, and watch one block of each kind.

Parameters and buffers are fake tensors: they have shapes, and no values. The blocks of other indices hand their input on.
Then all blocks run one by one, as in a walk, so that a network that does more between them is refused and not misread.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.checkpoint.small_files import first_line
from compresskit.errors import UnsupportedArchitecture
from compresskit.models.derivation import TOKENS, BlockTrace, Tracer, tensors_in, traced_linears
from compresskit.models.experts import can_be_unpacked, opaque, unpacked


def blocks_path(network: PreTrainedModel, file: Path) -> str:
    """Module path of the list of decoder blocks: the outermost list with the most parameters in the text decoder."""
    decoder = network.get_decoder() if hasattr(network, "get_decoder") else network
    # The decoder of a network that was made of an encoder may be its head.
    is_decoder = isinstance(decoder, nn.Module) and any(isinstance(each, nn.ModuleList) for each in decoder.modules())
    inside: nn.Module = decoder if is_decoder else network
    prefix = next((name for name, module in network.named_modules() if module is inside), "")
    lists = [(name, module) for name, module in inside.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [(name, each) for name, each in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    counted = [(sum(p.numel() for p in each.parameters()), name) for name, each in outermost]
    if not counted or max(counted)[0] == 0:
        raise UnsupportedArchitecture(f"{file}: {type(network).__name__} has no list of decoder blocks")
    name = max(counted)[1]
    return f"{prefix}.{name}" if prefix else name


def kinds_of(modules: Any) -> tuple[list[int], list[int]]:
    """(kind of every block, index of the first block of each kind)."""
    known: dict[Any, int] = {}
    kind_of, first = [], []
    for index, block in enumerate(modules):
        signature = _signature(block)
        if signature not in known:
            known[signature] = len(known)
            first.append(index)
        kind_of.append(known[signature])
    return kind_of, first


def _signature(block: nn.Module) -> Any:
    parts = []
    for name, module in block.named_modules():
        shapes = tuple((key, tuple(p.shape)) for key, p in module._parameters.items() if p is not None)
        simple = tuple(sorted(
            (key, value) for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key not in ("layer_idx", "training") and "layer_id" not in key
        ))  # fmt: skip
        parts.append((name, type(module).__qualname__, shapes, simple))
    return tuple(parts)


def make_fake(network: nn.Module) -> None:
    """Give every parameter and buffer a fake tensor on the CPU: shapes without memory."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def unpack_experts(network: nn.Module, blocks: str, separate: Container[str]) -> None:
    """Put one plain expert in place of those that can be unpacked; `separate`: where gate and up are stored apart."""
    for path, module in list(network.named_modules()):
        if path.startswith(blocks + ".") and can_be_unpacked(module):
            plain = unpacked(module, path not in separate, torch.device("cpu"), count=1)
            plain.traced = True
            network.set_submodule(path, plain)
        elif path.startswith(blocks + ".") and opaque(module):
            module.forward = _left_out


def _left_out(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stands for experts of another form in a trace: which tokens go where depends on values."""
    return torch.zeros_like(hidden_states)


def traced(network: PreTrainedModel, modules: Any, kind_of: list[int], first: list[int], file: Path) -> list[BlockTrace]:
    """Run the network once; one block of each kind runs, the others hand their input on.

    Where a block reads what an earlier one left behind, all blocks run.

    Returns:
        What was seen of the first block of each kind.

    Raises:
        UnsupportedArchitecture: the network does not run without values, or not on text alone.
    """
    reason = ""
    for skipping in (True, False):
        try:
            traces = _run(network, modules, kind_of, first, skipping)
            _check_one_by_one(network, modules, [traces[kind] for kind in kind_of])
            return traces
        except Exception as error:  # whatever the network's own code raises without values
            reason = first_line(error)
    raise UnsupportedArchitecture(f"{file}: {type(network).__name__} cannot be traced ({reason})")


def _run(network: PreTrainedModel, modules: Any, kind_of: list[int], first: list[int], skipping: bool) -> list[BlockTrace]:
    tracer = Tracer()
    traces = [BlockTrace() for _ in first]
    stream: list[Any] = []
    with ExitStack() as stack:
        for index, module in enumerate(modules):
            trace, is_first = traces[kind_of[index]], index == first[kind_of[index]]
            watched = _watched(tracer, module, trace, module.forward, is_first, skipping)
            stack.enter_context(_replaced(module, _in_line(watched, type(module).__name__, stream, tracer)))
        with tracer:
            network(input_ids=_text(), use_cache=False)
    if not any(trace.ran for trace in traces):
        raise UnsupportedArchitecture("no block runs on text alone")
    return traces


def _text() -> Tensor:
    return torch.zeros(1, TOKENS, dtype=torch.int64)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _state(tensor: Tensor) -> Any:
    """What is equal of two tensors if they are the same entries of the same memory, in its same state."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor._version


def _in_line(forward: Callable[..., Any], name: str, stream: list[Any], tracer: Tracer) -> Callable[..., Any]:
    """A block that runs once, and takes of the block before it what that gave; `stream` holds that, and its state."""
    ran: list[bool] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        if ran:
            raise UnsupportedArchitecture(f"{name} runs more than once")
        if given.shape[-2] != TOKENS:
            raise UnsupportedArchitecture(f"{name} runs on hidden states of shape {list(given.shape)} for {TOKENS} tokens")
        if stream and stream[-1][1] != _state(given):
            raise UnsupportedArchitecture(f"{name} does not run on what the block before it gives")
        # What blocks leave in a container that all of them get is there in a walk, too.
        others = [*args[1:], *(value for key, value in kwargs.items() if key != "hidden_states")]
        if any(id(tensor) in tracer.later for each in others if isinstance(each, (Tensor, tuple)) for tensor in tensors_in(each)):
            raise UnsupportedArchitecture(f"{name} takes more from the block before it than hidden states")
        ran.append(True)
        out = forward(*args, **kwargs)
        result = out[0] if isinstance(out, tuple) else out
        stream.append((result, _state(result)))
        tracer.later |= {id(each): each for each in tensors_in(out)}
        return out

    return run


def _check_one_by_one(network: PreTrainedModel, modules: Any, traces: list[BlockTrace]) -> None:
    """Run each block with the arguments that a walk captures; what blocks leave to others in these is there by then.

    Whatever a block's code raises for want of another's results is raised on.
    """
    calls: list[Any] = [None] * len(modules)
    hidden: list[Tensor] = []

    def noting(index: int) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[index] = args, kwargs
            hidden.append(hidden_states)
            length = traces[index].tuple_length
            return (hidden_states, *(None,) * (length - 1)) if length else hidden_states

        return run

    with ExitStack() as stack:
        for index, module in enumerate(modules):
            stack.enter_context(_replaced(module, noting(index)))
        network(input_ids=_text(), use_cache=False)
    given = hidden[0]
    for module, call in zip(modules, calls, strict=True):
        if call is not None:
            out = module(given, *call[0], **call[1])
            given = out[0] if isinstance(out, tuple) else out


def _watched(tracer: Tracer, module: nn.Module, trace: BlockTrace, forward: Any, is_first: bool, skipping: bool) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not is_first:
            if not skipping:
                return forward(*args, **kwargs)
            given = args[0] if args else kwargs["hidden_states"]
            return (given, *(None,) * (trace.tuple_length - 1)) if trace.tuple_length else given
        given = args[0] if args else kwargs["hidden_states"]
        tracer.clear()  # names are relative to the block
        tracer.trace, trace.ran, trace.hidden = trace, True, int(given.shape[-1])
        with traced_linears(tracer, module, trace):
            out = forward(*args, **kwargs)
        # What the block hands to later ones is read by more than its own linears.
        trace.leaky |= {part.linear for each in tensors_in((out, args, kwargs)) for part in tracer.of(each).channels}
        tracer.trace = None
        trace.tuple_length = len(out) if isinstance(out, tuple) else 0
        result = out[0] if isinstance(out, tuple) else out
        if not isinstance(result, Tensor) or result.shape != given.shape:
            raise UnsupportedArchitecture(f"{type(module).__name__} does not return hidden states of its input's shape")
        return out

    return run
