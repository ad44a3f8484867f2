"""Derive the structure of any causal language model from its stock network.

The stock network is built without memory (fake tensors) at its real size, and its forward pass is traced once. One block
of each kind runs; the others hand their input on. For every operation the trace keeps two facts about the result: which
linears it depends on, and whether its last axis is the channel axis of linears, that is, whether entry j depends on row j
of their weights alone. From these follow

    the linears of a block     modules that compute x W^T + b, called once; grouped by the same input tensor
    their order                a linear comes after those that its input depends on
    feed-forward networks      an output linear whose input is channel by channel a function of other linears, which nothing
                               else reads. Removing such a channel is the same as zeroing it: no other one is touched.
    routers                    linears whose outputs choose experts; they are never edited

What the trace does not show to be plain use stays as it is and is listed as untouched, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from compresskit.models.architectures import Positions, Sublayer
from compresskit.models.experts import PlainExperts

TOKENS = 7
"""Length of the traced text: a prime, so that no width is a multiple of it."""
ELEMENTWISE = frozenset({
    "abs", "add", "addcmul", "celu", "clamp", "clamp_max", "clamp_min", "div", "elu", "eq", "erf", "exp", "expm1", "ge", "gelu",
    "gt", "hardsigmoid", "hardswish", "hardtanh", "le", "leaky_relu", "lerp", "log", "log1p", "log_sigmoid_forward", "lt",
    "masked_fill", "maximum", "minimum", "mish", "mul", "ne", "neg", "pow", "reciprocal", "relu", "rsqrt", "rsub", "selu",
    "sigmoid", "silu", "softplus", "sqrt", "square", "sub", "tanh", "threshold", "where", "xlogy",
})  # fmt: skip
"""Operations that compute every entry of their result from the entries at the same place."""
LINEAR_OPERATIONS = frozenset({"add", "sub", "neg", "rsub"})
KEEPING = frozenset({
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "chunk", "clone", "contiguous", "copy", "copy_", "detach", "expand",
    "index", "lift_fresh", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to",
    "transpose", "unbind", "unsqueeze", "view",
})  # fmt: skip
"""Operations that move entries and change none; `_moved` says where the channel axis stays whole."""
CHOOSING = frozenset({"topk", "sort", "argmax", "argsort", "bincount", "histc"})
"""Operations that turn scores into choices of experts."""
PRODUCTS = frozenset({"mm", "bmm", "addmm", "baddbmm", "matmul", "linear", "dot", "mv", "_grouped_mm"})


@dataclass(frozen=True)
class Part:
    """One of `count` equal parts of a linear's output rows."""

    linear: str
    number: int = 0
    count: int = 1
    interleaved: bool = False


@dataclass(frozen=True)
class Facts:
    """What the trace knows of a tensor."""

    channels: frozenset[Part] = frozenset()
    """The parts of linears of which entry j of the last axis is a function, channel by channel; empty if it is not."""
    nonlinear: bool = False
    """Whether an activation or a product lies between the linears and this tensor."""
    direct: frozenset[str] = frozenset()
    """Linears that reach the tensor without another linear between."""
    reach: frozenset[str] = frozenset()
    """All linears of the block that the tensor depends on."""


NOTHING = Facts()


@dataclass(frozen=True)
class LinearCall:
    """One call of a linear."""

    name: str
    """Name inside the block."""
    input_key: int
    facts: Facts
    """Of its input."""
    inputs: int
    outputs: int


@dataclass
class BlockTrace:
    """What one run of a block showed."""

    calls: list[LinearCall] = field(default_factory=list)
    leaky: set[str] = field(default_factory=set)
    """Linears whose output reaches an operation that mixes channels."""
    routers: set[str] = field(default_factory=set)
    """Linears whose output chooses experts."""
    tuple_length: int = 0
    """Length of the tuple that the block returns, its hidden states first; 0 if it returns the tensor itself."""
    ran: bool = False
    hidden: int = 0
    """Width of the block's input."""


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the tensors of the block that runs, operation by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.facts: dict[int, Facts] = {}
        self.written: dict[int, Facts] = {}
        """Facts by memory, of what several tensors share and an operation has changed in place."""
        self.alive: list[Any] = []
        self.trace: BlockTrace | None = None
        self.inside_linear = 0
        self.later: dict[int, Tensor] = {}
        """What follows from the output of a block, by identity."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.trace is not None and not self.inside_linear:
            self._follow(func, args, kwargs or {}, out)
        elif self.trace is None and self.later and any(id(each) in self.later for each in tensors_in((args, kwargs))):
            self.later |= {id(each): each for each in tensors_in(out)}
        return out

    def clear(self) -> None:
        """Forget all tensors, before another block runs."""
        self.facts.clear()
        self.written.clear()

    def of(self, tensor: Any) -> Facts:
        """Facts of a tensor; none for what did not come from a linear of the block."""
        found = self.facts.get(id(tensor))
        return found or (self.written.get(_memory(tensor), NOTHING) if self.written else NOTHING)

    def keep(self, tensor: Tensor, facts: Facts) -> None:
        """Note the facts of a tensor, and keep it alive: its identity is its key."""
        self.facts[id(tensor)] = facts
        self.alive.append(tensor)

    def _follow(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        assert self.trace is not None
        inputs = list(tensors_in((args, kwargs)))
        known = [self.of(each) for each in inputs]
        direct = frozenset().union(*(facts.direct for facts in known))
        reach = frozenset().union(*(facts.reach for facts in known))
        if not reach:
            return
        name = func.__name__.partition(".")[0]
        name = name if name in KEEPING else name.rstrip("_")
        if name in CHOOSING:
            self.trace.routers |= direct
        if name in PRODUCTS:  # a product with a bare parameter is a linear, too, though none that can be edited
            direct = frozenset()
        if func._schema.is_mutable and isinstance(args[0], Tensor) and self._is_shared(args[0]):
            self._overwrite(args[0], Facts(direct=direct, reach=reach), {part for facts in known for part in facts.channels})
            return
        results = list(tensors_in(out))
        for number, result in enumerate(results):
            channels, nonlinear = self._channels(name, args, inputs, result, number, len(results))
            if not channels:
                self.trace.leaky |= {part.linear for facts in known for part in facts.channels}
            self.keep(result, Facts(channels, nonlinear, direct, reach))

    def _is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor's memory holds other tensors, too."""
        place = _memory(tensor)
        partial = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
        unknown = id(tensor) not in self.facts and tensor._is_view()
        return partial or unknown or any(each is not tensor and _memory(each) == place for each in self.alive)

    def _overwrite(self, tensor: Tensor, facts: Facts, parts: set[Part]) -> None:
        """Forget what was known of the channels in a tensor's memory: an operation has written to some of it."""
        assert self.trace is not None
        place = _memory(tensor)
        known = [self.of(each) for each in self.alive if _memory(each) == place]
        for each in self.alive:
            if _memory(each) == place:
                self.facts.pop(id(each), None)
        self.trace.leaky |= {part.linear for part in parts.union(*(each.channels for each in known))}
        direct, reach = facts.direct.union(*(each.direct for each in known)), facts.reach.union(*(each.reach for each in known))
        self.written[place] = Facts(direct=direct, reach=reach)

    def _channels(
        self, name: str, args: Any, inputs: list[Tensor], result: Tensor, number: int, count: int
    ) -> tuple[frozenset[Part], bool]:
        """(channels of a result, whether they passed an activation or a product)."""
        carriers = [each for each in inputs if self.of(each).channels]
        if not carriers:
            return frozenset(), False
        nonlinear = any(self.of(each).nonlinear for each in carriers)
        if name in ELEMENTWISE:
            parts = frozenset().union(*(self.of(each).channels for each in carriers))
            if not all(self._acts_alike(each, result, parts) for each in inputs):
                return frozenset(), False
            product = name not in LINEAR_OPERATIONS and not (name in ("mul", "div") and len(carriers) < 2)
            return parts, nonlinear or product
        if name in KEEPING and len(carriers) == 1 and not (name == "copy_" and carriers[0] is args[0]):
            channels = self.of(carriers[0]).channels
            if name in ("transpose", "permute", "t", "index") or (result.ndim and result.shape[-1] == carriers[0].shape[-1]):
                return (channels if _last_axis_stays(name, args, carriers[0], result) else frozenset()), nonlinear
            return _part(name, args, carriers[0], channels, (result, number, count)), nonlinear
        return frozenset(), False

    def _acts_alike(self, given: Tensor, result: Tensor, parts: frozenset[Part]) -> bool:
        """Whether an operand of an elementwise operation keeps its channels apart: it carries them, or is one number for all."""
        if self.of(given).channels:
            return given.shape == result.shape
        one_for_all = not given.ndim or given.shape[-1] == 1
        return one_for_all and not self.of(given).direct & {part.linear for part in parts}


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _memory(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


def _last_axis_stays(name: str, args: Any, source: Tensor, result: Tensor) -> bool:
    """Whether the last axis of a result is that of the tensor whose entries it holds."""
    if name == "index":
        return sum(each.ndim if each is not None and each.dtype == torch.bool else 1 for each in args[1]) < source.ndim
    if name not in ("transpose", "permute", "t"):
        return True
    same = result.ndim > 0 and result.shape[-1] == source.shape[-1]
    return same and result.stride()[-1] == source.stride()[-1]


def _part(name: str, args: Any, source: Tensor, channels: frozenset[Part], result: tuple[Tensor, int, int]) -> frozenset[Part]:
    """The part of a linear's outputs that a narrower result holds. `result`: a tensor, its number among all, their count."""
    found, number, count = result
    whole = len(channels) == 1 and next(iter(channels)).count == 1
    if not whole or not found.ndim:
        return frozenset()
    linear, width, size = next(iter(channels)).linear, source.shape[-1], found.shape[-1]
    if name in ("split", "split_with_sizes", "chunk") and size * count == width:
        return frozenset([Part(linear, number, count)])
    if name == "slice" and found.ndim == source.ndim:
        part = _sliced(args, source, size)
        return frozenset([Part(linear, *part)]) if part else frozenset()
    return frozenset()


def _sliced(args: Any, source: Tensor, size: int) -> tuple[int, int, bool] | None:
    """(number, count, interleaved) of the part that `aten.slice` of these arguments takes; None if it is no equal part."""
    width = source.shape[-1]
    given = [*args, *[None] * 5]
    axis, start, step = given[1], given[2], given[4]
    if (axis or 0) not in (-1, source.ndim - 1):
        return None
    begin, step = int(start or 0), int(step or 1)
    begin += width if begin < 0 else 0
    if step > 1:
        return (begin, step, True) if begin < step and size * step == width else None
    return (begin // size, width // size, False) if width % size == 0 and begin % size == 0 else None


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b of its weight and bias: an `nn.Linear`, Conv1D, or a class that does the same."""
    if isinstance(module, Conv1D) or type(module) is nn.Linear:
        return True
    return isinstance(module, nn.Linear) and _computes_a_product(type(module))


def _computes_a_product(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of `nn.Linear` gives what `nn.Linear` gives, tried on a small one."""
    if kind.forward is nn.Linear.forward:
        return True
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
        try:
            linear, x = kind(4, 3, bias=True), torch.randn(2, 5, 4)
            return torch.allclose(linear(x), nn.functional.linear(x, linear.weight, linear.bias))
        except Exception:  # a class with other arguments is none that can be replaced
            return False


@contextmanager
def traced_linears(tracer: Tracer, block: nn.Module, trace: BlockTrace) -> Iterator[None]:
    """Record the calls of a block's linears while it runs."""
    with ExitStack() as stack:
        for name, module in block.named_modules():
            if not is_linear(module):
                continue
            stack.callback(module.register_forward_pre_hook(_before(tracer)).remove)
            stack.callback(module.register_forward_hook(_after(tracer, name, trace), with_kwargs=True).remove)
        yield


def _before(tracer: Tracer) -> Callable[..., None]:
    def note(*_: Any) -> None:
        tracer.inside_linear += 1

    return note


def _after(tracer: Tracer, name: str, trace: BlockTrace) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        tracer.inside_linear -= 1
        if tracer.trace is not trace:
            return
        given = args[0] if args else kwargs["input"]
        facts = tracer.of(given)
        tracer.alive.append(given)
        trace.calls.append(LinearCall(name, id(given), facts, given.shape[-1], out.shape[-1]))
        tracer.keep(out, Facts(frozenset([Part(name)]), False, frozenset([name]), facts.reach | {name}))

    return note


def ffns_of(trace: BlockTrace, usable: set[str]) -> list[Sublayer]:
    """Feed-forward networks of a block, in the order of their output linears; `usable`: linears that can be edited."""
    found: list[Sublayer] = []
    outputs = {call.name: call.outputs for call in trace.calls}
    readers: dict[str, list[str]] = {}
    for call in trace.calls:
        for part in call.facts.channels:
            readers.setdefault(part.linear, []).append(call.name)
    for call in trace.calls:
        parts = call.facts.channels
        if not parts or not call.facts.nonlinear or call.name not in usable:
            continue
        by_linear: dict[str, set[Part]] = {}
        for part in parts:
            by_linear.setdefault(part.linear, set()).add(part)
        ins = [each.name for each in trace.calls if each.name in by_linear]
        shapes = {(part.count, part.interleaved) for part in parts}
        whole = len(shapes) == 1 and all(len(held) == next(iter(shapes))[0] for held in by_linear.values())
        count = next(iter(shapes))[0]
        fits = all(outputs[name] == call.inputs * count for name in ins)
        alone = all(name in usable and name not in trace.leaky and set(readers[name]) == {call.name} for name in ins)
        if whole and fits and alone and call.name not in ins:
            found.append(Sublayer(tuple(ins), call.name, "", count, interleaved=next(iter(shapes))[1]))
    return found


def positions_of(trace: BlockTrace, usable: set[str], ffns: Sequence[Sublayer]) -> tuple[Positions, int]:
    """Order the linears of a block.

    Linears of networks keep to themselves: first all that precede a network, then the networks, and so on. Inside such a
    segment a group comes after those that its input depends on.

    Returns:
        (positions of groups of linears in compute order, number of positions before the first feed-forward network).
    """
    of_networks = {name for ffn in ffns for name in (*ffn.in_projections, ffn.out_projection)}
    segments: list[tuple[bool, list[LinearCall]]] = []
    for call in trace.calls:
        if call.name not in usable:
            continue
        in_network = call.name in of_networks
        if not segments or segments[-1][0] != in_network:
            segments.append((in_network, []))
        segments[-1][1].append(call)
    positions: list[tuple[tuple[str, ...], ...]] = []
    mixer = 0
    for number, (in_network, calls) in enumerate(segments):
        positions += _levels(calls)
        if number == 0 and not in_network:
            mixer = len(positions)
    return tuple(positions), mixer


def _levels(calls: Sequence[LinearCall]) -> list[tuple[tuple[str, ...], ...]]:
    level_of: dict[str, int] = {}
    levels: list[dict[int, list[str]]] = []
    for call in calls:
        level = 1 + max((level_of[name] for name in call.facts.reach if name in level_of), default=-1)
        level_of[call.name] = level
        while len(levels) <= level:
            levels.append({})
        levels[level].setdefault(call.input_key, []).append(call.name)
    return [tuple(tuple(names) for names in groups.values()) for groups in levels]


def common_module(block: nn.Module, names: Sequence[str]) -> str:
    """The smallest module inside a block that holds all these linears; "" if only the block itself does."""
    if not names:
        return ""
    parts = [name.split(".")[:-1] for name in names]
    shared: list[str] = []
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        shared.append(each[0])
    found = ".".join(shared)
    return "" if not found or isinstance(block.get_submodule(found), (nn.ModuleList, nn.ModuleDict)) else found


def experts_inside(block: nn.Module) -> Mapping[str, PlainExperts]:
    """The unpacked experts of a block by module path."""
    return {name: module for name, module in block.named_modules() if isinstance(module, PlainExperts)}
