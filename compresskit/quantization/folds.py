"""Where a division of linears' inputs can be folded: into the norm that makes them, or into the rows of a linear before them.

What can be folded is found by what it does. With factors of 1/2 and 2 on the writer and their inverses on the readers' columns,
the readers and the block have to compute what they did before. An input that something else reads too, a norm's output that is
changed on its way, or an activation that does not keep factors fails that trial.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.machine.precision import torch_dtype
from compresskit.models.model import Model
from compresskit.walk.block import Block
from compresskit.walk.sequence import replace_weight

TOLERANCE = 0.05
"""Share by which a token may change: a norm in bfloat16 that adds 1 rounds by up to 0.02, a wrong fold changes half."""
ROUNDINGS = 4
"""Units in the last place by which sums with the residual stream may differ."""


@dataclass(frozen=True)
class Fold:
    """A norm or a linear, and the linears that read its output."""

    writer: str
    """Path inside the block."""
    readers: tuple[str, ...]
    """Plain names of linears with one input."""
    adds_one: bool = False
    """Whether the norm multiplies by 1 + its weight."""
    shared: tuple[int, int] = (1, 1)
    """(heads that read the same outputs, outputs of a head); (1, 1) where every output is one input."""

    def renamed(self, rename: Callable[[str], str]) -> Fold:
        """The same with other names of the readers."""
        return replace(self, readers=tuple(map(rename, self.readers)))

    def spread(self, factors: Tensor) -> Tensor:
        """Factors of the readers' inputs (in,) from those of the writer's outputs (out,)."""
        heads, size = self.shared
        return factors.view(-1, 1, size).expand(-1, heads, size).reshape(-1)

    def gathered(self, values: Tensor) -> Tensor:
        """Mean (out,) of values of the readers' inputs (in,) over the heads that share an output."""
        heads, size = self.shared
        return values.view(-1, heads, size).mean(dim=1).reshape(-1)


def find_folds(
    block: Block, sequence: Sequence[Sequence[tuple[str, ...]]], with_linears: bool, known: Sequence[Fold] = ()
) -> list[Fold]:
    """Look for a fold before each group of linears with a shared input; `with_linears`: into linears of the sequence too.

    `sequence`: as `Model.linear_sequence`, of the linears that may be changed. `known`: folds that an earlier block had, by the
    names of this one; a single trial tells whether they hold here.

    Returns:
        One fold for each group that has one, in the groups' order, the same on all ranks.
    """
    if not block.micro_batches or not block.runs:
        return []
    groups = [(number, group) for number, position in enumerate(sequence) for group in position]
    there = [fold for fold in known if any(fold.readers == group for _, group in groups)]
    found = {fold.readers: fold for fold in distributed.from_first(lambda: there if there and _hold(block, there) else [])}
    left = [(number, group) for number, group in groups if group not in found]
    norms = _norms_before(block, [group[0] for _, group in left]) if left else {}
    for number, group in left:
        candidates = [Fold(norms[group[0]], group, adds_one) for adds_one in (False, True)] if group[0] in norms else []
        if with_linears:
            earlier = [name for position in sequence[:number] for names in position for name in names]
            candidates += _linear_folds(block, group, earlier, number < block.mixer_positions)
        holding = distributed.from_first(partial(_first_that_holds, block, candidates))
        found |= {} if holding is None else {group: holding}
    return [found[group] for _, group in groups if group in found]


def fold_into(model: Model, block: Block, fold: Fold, factors: Tensor) -> dict[str, Tensor]:
    """Divide the writer's outputs by `factors` (out,), and multiply the readers' columns, in place.

    Returns:
        The changed norms and biases by stored name, in their stored dtypes; the block has these values too.
    """
    _change(block, fold, factors)
    stored = {}
    for name, parameter in block.module.get_submodule(fold.writer).named_parameters():
        if parameter.ndim == 1:
            plain = f"{block.name}.{fold.writer}.{name}"
            stored[model.stored_name(plain)] = value = parameter.detach().to(_stored_dtype(model, plain))
            parameter.data = value.to(parameter)
    return stored


def exact_factors(model: Model, block: Block, fold: Fold, factors: Tensor) -> Tensor:
    """The factors that a norm's weight holds in its stored dtype once it is divided; 1 where that is 0 or too large."""
    writer = block.module.get_submodule(fold.writer)
    if isinstance(writer, nn.Linear):
        return factors
    weight, added = writer.get_parameter("weight").float(), float(fold.adds_one)
    stored = ((weight + added) / factors - added).to(_stored_dtype(model, f"{block.name}.{fold.writer}.weight"))
    held = (weight + added) / (stored.float() + added)
    return torch.where(held.isfinite() & (held > 0), held, torch.ones_like(held))


def is_in_range(model: Model, block: Block, fold: Fold, factors: Tensor, scales: tuple[torch.dtype, int]) -> bool:
    """Whether the stored dtypes hold a writer's biases and its scales, of (dtype, steps), once divided by `factors` (out,)."""
    writer = block.module.get_submodule(fold.writer)
    for name, parameter in writer.named_parameters():
        if parameter.ndim == 1:
            limits = torch.finfo(_stored_dtype(model, f"{block.name}.{fold.writer}.{name}"))
            if bool((parameter.float() / factors).abs().amax() > limits.max):
                return False
        else:
            limits, before = torch.finfo(scales[0]), parameter.float().abs().amax(dim=1) / scales[1]
            after = before / factors
            if bool(((after > limits.max) | ((after < limits.tiny) & (before >= limits.tiny))).any()):
                return False
    return True


def _stored_dtype(model: Model, plain: str) -> torch.dtype:
    return torch_dtype(model.spec_of(plain).dtype)


def _norms_before(block: Block, linears: Sequence[str]) -> dict[str, str]:
    """Path of the norm whose output is a linear's input, by linear; without those that have none."""
    last: dict[str, Tensor] = {}
    norms: dict[str, str] = {}

    def see(linear: str, x: Tensor) -> None:
        norm = next((name for name, output in last.items() if output is x), None)
        if norm is not None:
            norms[linear] = norm

    def look() -> dict[str, str]:
        with ExitStack() as stack:
            for name, module in block.module.named_modules():
                own = list(module.parameters())
                if own and all(parameter.ndim == 1 for parameter in own):
                    keep = lambda _, args, output, name=name: last.update({name: output})  # noqa: E731
                    stack.callback(module.register_forward_hook(keep).remove)
            for linear in linears:
                read = lambda _, args, linear=linear: see(linear, args[0])  # noqa: E731
                stack.callback(block.linear(linear).register_forward_pre_hook(read).remove)
            block.run(block.hidden[0], 0)
        return norms

    return distributed.from_first(look)


def _linear_folds(block: Block, readers: tuple[str, ...], earlier: Sequence[str], attends: bool) -> list[Fold]:
    """Candidates among the linears before; `attends`: attention is between, where heads may share keys and values."""
    inputs, found = block.linear(readers[0]).in_features, []
    attention = block.module.get_submodule(block.attention) if block.attention else None
    size = getattr(attention, "head_dim", 0) if attends else 0
    for name in reversed(earlier):  # values come after queries and keys, `up` after `gate`
        fold = Fold(name.removeprefix(f"{block.name}."), readers)
        outputs = block.linear(name).out_features
        if outputs == inputs:
            found.append(fold)
        elif isinstance(size, int) and size and inputs % outputs == outputs % size == 0:
            found.append(replace(fold, shared=(inputs // outputs, size)))
    return found


def _first_that_holds(block: Block, candidates: Sequence[Fold]) -> Fold | None:
    return next((fold for fold in candidates if _hold(block, [fold])), None)


def _hold(block: Block, folds: Sequence[Fold]) -> bool:
    """Whether the readers and the block compute the same with trial factors of all folds; the block is left as it was."""
    # Readers that are writers too are not compared: their outputs are divided.
    writers = {f"{block.name}.{fold.writer}" for fold in folds}
    readers = [name for fold in folds for name in fold.readers if name not in writers]
    before = _outputs(block, readers)
    with ExitStack() as stack:
        for fold in folds:
            stack.enter_context(_restored(block, fold))
            weight = next(block.module.get_submodule(fold.writer).parameters())
            signs = torch.randint(0, 2, (len(weight),), generator=torch.Generator().manual_seed(0)) * 2 - 1
            _change(block, fold, torch.exp2(signs.float()).to(weight.device))
        after = _outputs(block, readers)
    return _are_close(block, before, after)


@contextmanager
def _restored(block: Block, fold: Fold) -> Iterator[None]:
    """Give the writer and the readers their parameters back at the end."""
    changed: Mapping[str, nn.Parameter] = {
        name: parameter
        for path in (fold.writer, *(reader.removeprefix(f"{block.name}.") for reader in fold.readers))
        for name, parameter in ((f"{path}.{leaf}", each) for leaf, each in block.module.get_submodule(path).named_parameters())
    }
    values = {name: parameter.data for name, parameter in changed.items()}
    try:
        yield
    finally:
        for name, value in values.items():
            block.module.get_parameter(name).data = value


def _change(block: Block, fold: Fold, factors: Tensor) -> None:
    """Divide the writer's outputs by `factors` (out,), and multiply the readers' columns, in the block's dtype."""
    writer = block.module.get_submodule(fold.writer)
    added = float(fold.adds_one)
    for name, parameter in writer.named_parameters():
        value, own = parameter.data.float(), added if name == "weight" else 0.0
        divided = (value + own) / (factors if parameter.ndim == 1 else factors[:, None]) - own
        parameter.data = divided.to(parameter.data)
    for reader in fold.readers:
        linear = block.linear(reader)
        replace_weight(linear, linear.weight.float() * fold.spread(factors))


def _outputs(block: Block, readers: Sequence[str]) -> list[Tensor]:
    """On the first micro-batch, which the first rank has: the block's outputs, then those of the readers, (tokens, out) each."""
    found: list[Tensor] = []
    keep = lambda _, args, output: found.append(output.detach().flatten(0, -2))  # noqa: E731
    with ExitStack() as stack:
        for reader in readers:
            stack.callback(block.linear(reader).register_forward_hook(keep).remove)
        output = block.run(block.hidden[0], 0)
    return [output.flatten(0, -2), *found]


def _are_close(block: Block, before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Whether no token changed: what the block adds to its inputs, but for the rounding of that sum, and the readers' outputs."""
    residual = block.hidden[0].flatten(0, -2).float()
    noise = ROUNDINGS * torch.finfo(block.hidden[0].dtype).eps * residual.norm(dim=-1)
    if len(before) != len(after) or not _is_close(before[0].float() - residual, after[0].float() - residual, noise):
        return False
    return all(_is_close(*pair, torch.zeros(())) for pair in zip(before[1:], after[1:], strict=True))


def _is_close(before: Tensor, after: Tensor, noise: Tensor) -> bool:
    """Whether no token's values (tokens, out) changed by more than their share, and `noise` (tokens,)."""
    before, after = before.float(), after.float()
    return bool(((after - before).norm(dim=-1) <= TOLERANCE * before.norm(dim=-1) + noise.to(before)).all())
