"""SmoothQuant: move the spread of activation channels into the weights, through the norm before them.

SmoothQuant, arXiv 2211.10438, equation 4: norm weights are divided and the columns of the linears behind it multiplied by

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)                                                     (4)

symbol  meaning                                     shape         name here
X_j     channel j of the norm's output              (tokens,)     largest (in,): its largest magnitude
W_j     column j of the linears that read it        (out,)        weights
alpha   share of the spread that moves              ()            strength

Differs from the paper: s is rounded to powers of two, so that a norm in 16 bits holds the quotient exactly. A norm is found
by what it does: its output is the linears' input, and the block computes the same once both are changed. Norms that others
read too, and norms that store their weight minus one, fail or pass that test like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.models.model import Model
from compresskit.walk.block import Block
from compresskit.walk.sequence import chosen_sequence, replace_weight

TOLERANCE = 1e-3
"""Share of what the block adds to its inputs by which that may change."""
FOLDS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (lambda w, s: w / s, lambda w, s: (1 + w) / s - 1)
"""What divides a norm's output: its weight divided, or where 1 is added to the weight, that sum."""


class ChannelMaxima:
    """Largest magnitude of every feature, (features,) float32."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (..., features)."""
        found = x.detach().float().abs().flatten(0, -2).amax(dim=0)
        self.value = found if self.value is None else torch.maximum(self.value, found)

    def share(self) -> None:
        """Make them those of all ranks."""
        found = [value for value in distributed.every(self.value) if value is not None]
        self.value = torch.stack([each.to(found[0].device) for each in found]).amax(dim=0) if found else None


def factors(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """Equation 4 in powers of two. largest (in,), weights (out, in) each -> (in,); 1 for channels that are always 0."""
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    found = largest**strength / columns ** (1 - strength)
    rounded = torch.exp2(found.log2().round())
    return torch.where((largest > 0) & (columns > 0), rounded, torch.ones_like(rounded))


def smooth(model: Model, block: Block, chosen: Collection[str], strength: float) -> dict[str, Tensor]:
    """Smooth the inputs of a block's chosen linears in place, wherever a norm makes them and nothing else reads it.

    Returns:
        The changed parameters of norms by stored name, in their stored dtypes.
    """
    changed: dict[str, Tensor] = {}
    if not block.micro_batches or not block.runs:
        return changed
    groups = [group for position in chosen_sequence(model, block.index, chosen) for group in position]
    found = _norms_before(block, [group[0] for group in groups])
    for group in (group for group in groups if group[0] in found):
        path, largest = found[group[0]]
        names = [f"{path}.{leaf}" for leaf, _ in block.module.get_submodule(path).named_parameters()]
        if _folded(block, names, group, factors(largest, [block.linear(name).weight for name in group], strength)):
            for name in names:
                plain = f"{block.name}.{name}"
                changed[model.stored_name(plain)] = block.module.get_parameter(name).to(_dtype(model, plain))
    return changed


def _dtype(model: Model, plain: str) -> torch.dtype:
    from compresskit.machine.precision import torch_dtype

    return torch_dtype(model.spec_of(plain).dtype)


def _norms_before(block: Block, linears: Sequence[str]) -> dict[str, tuple[str, Tensor]]:
    """(path of the norm before it, largest magnitude of each of its channels) by linear; without those that have no norm."""
    last: dict[str, Tensor] = {}
    norms: dict[str, str] = {}
    maxima = {linear: ChannelMaxima() for linear in linears}

    def seen(linear: str, x: Tensor) -> None:
        norm = next((name for name, output in last.items() if output is x), None)
        if norm is not None:
            norms[linear] = norm
            maxima[linear].add(x)

    with ExitStack() as stack:
        for name, module in block.module.named_modules():
            own = list(module.parameters())
            if own and all(parameter.ndim == 1 for parameter in own):
                keep = lambda _, args, output, name=name: last.update({name: output})  # noqa: E731
                stack.callback(module.register_forward_hook(keep).remove)
        for linear in linears:
            see = lambda _, args, linear=linear: seen(linear, args[0])  # noqa: E731
            stack.callback(block.linear(linear).register_forward_pre_hook(see).remove)
        for number, hidden in enumerate(block.hidden):
            block.run(hidden, number)
    for each in maxima.values():
        each.share()
    for others in distributed.every(norms):
        norms |= others
    return {linear: (norm, value) for linear, norm in norms.items() if (value := maxima[linear].value) is not None}


def _folded(block: Block, names: Sequence[str], group: Sequence[str], scale: Tensor) -> bool:
    """Divide a norm's parameters and multiply its linears, if the block then computes the same; else leave all as it was."""
    before = block.run(block.hidden[0], 0) if block.hidden else None
    norm = {name: block.module.get_parameter(name).data for name in names}
    weights = {name: block.linear(name).weight.data for name in group}
    for fold in FOLDS:
        for name, value in norm.items():
            divided = fold(value, scale) if name.endswith(".weight") else value / scale
            block.module.get_parameter(name).data = divided.to(value)
        for name, weight in weights.items():
            replace_weight(block.linear(name), weight * scale)
        if distributed.from_first(lambda: _is_unchanged(block, before)):
            return True
    for name, value in norm.items():
        block.module.get_parameter(name).data = value
    for name, weight in weights.items():
        replace_weight(block.linear(name), weight)
    return False


def _is_unchanged(block: Block, before: Tensor | None) -> bool:
    """Whether the block gives what it gave on the first micro-batch, which the first rank has."""
    if before is None:
        return True
    allowed = TOLERANCE * float((before - block.hidden[0]).norm())
    return float((block.run(block.hidden[0], 0) - before).norm()) <= allowed
