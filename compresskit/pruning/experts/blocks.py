"""A block with fewer experts: its module, filled from the original's, what runs through its experts, and its stored tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.checkpoint.writer import Writer
from compresskit.models import meta
from compresskit.models.experts import PlainExperts
from compresskit.models.fewer_experts import LEAVES, experts_path, linears_of
from compresskit.models.model import Model
from compresskit.pruning.experts.refit import Routed


def experts_of(module: nn.Module, model: Model, index: int) -> PlainExperts:
    """The experts inside a block's module."""
    found = module.get_submodule(experts_path(model, index))
    assert isinstance(found, PlainExperts)
    return found


def cut(before: nn.Module, after: nn.Module, path: str, kept: Sequence[int]) -> None:
    """Fill a block's module with the tensors of one that has more experts.

    `after` has meta tensors of the shapes of `len(kept)` experts; its expert i becomes expert `kept[i]` of `before`. Of other
    tensors with an entry an expert the entries of `kept` are taken, all others are shared.
    """
    for name, parameter in list(after.named_parameters()):
        found = before.get_parameter(_of_old(name, path, kept)).detach()
        _put(after, name, nn.Parameter(_taken(found, parameter.shape, kept), requires_grad=False))
    for name, buffer in list(after.named_buffers()):
        _put(after, name, _taken(before.get_buffer(name), buffer.shape, kept))


def _of_old(name: str, path: str, kept: Sequence[int]) -> str:
    """The name in the old block of a tensor in the new one."""
    prefix = f"{path}."
    if not name.startswith(prefix):
        return name
    number, _, rest = name.removeprefix(prefix).partition(".")
    return f"{prefix}{kept[int(number)]}.{rest}"


def _taken(found: Tensor, shape: torch.Size, kept: Sequence[int]) -> Tensor:
    """A tensor, or of the one axis that is longer than in `shape` the `kept` entries."""
    for axis, (old, new) in enumerate(zip(found.shape, shape, strict=True)):
        if old != new:
            return found.index_select(axis, torch.tensor(kept, device=found.device))
    return found


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


@contextmanager
def recorded(experts: PlainExperts, seen: list[Routed]) -> Iterator[None]:
    """Append to `seen` what runs through the experts, micro-batch by micro-batch."""

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append(Routed(*experts.arguments(args, kwargs), output))

    handle = experts.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def write_block(
    models: tuple[Model, Model], index: int, kept: Sequence[int], edited: Mapping[str, Tensor], writer: Writer
) -> None:
    """Give the writer the tensors of a block that have an entry an expert.

    `models`: the source and the result. `edited`: plain name in the result -> the tensor as it is stored; all others are the
    source's bytes.
    """
    source, result = models
    prefix = f"{source.stored_blocks}{index}."
    names = [name for name in writer.specs if name.startswith(prefix)]
    by_stored = {result.stored_name(name): tensor for name, tensor in edited.items() if result.packed(name) is None}
    mine = set(_write_experts(models, index, kept, edited, writer))
    for name in names:
        old, new = source.checkpoint.tensors.get(name), writer.specs[name]
        if name in by_stored and name not in mine:
            writer.put(name, by_stored[name])
        elif old is not None and old.shape != new.shape and name not in mine:
            found = source.checkpoint.read(name) if distributed.is_first() else torch.empty(new.shape)
            writer.put(name, _taken(found, torch.Size(new.shape), kept))


def _write_experts(
    models: tuple[Model, Model], index: int, kept: Sequence[int], edited: Mapping[str, Tensor], writer: Writer
) -> Iterator[str]:
    """Write the experts' tensors; yields their stored names."""
    source, result = models
    old, new = linears_of(source, index), linears_of(result, index)
    packed: dict[str, list[list[Tensor]]] = {}
    for number, expert in enumerate(kept):
        for old_linear, new_linear in zip(old[expert], new[number], strict=True):
            for leaf in LEAVES:
                name = f"{new_linear}.{leaf}"
                if not source.has(f"{old_linear}.{leaf}"):
                    continue
                part = result.packed(name)
                stored = part.stored if part else result.stored_name(name)
                yield stored
                if not distributed.is_first():
                    writer.missing.discard(stored)
                    continue
                tensor = edited[name] if name in edited else meta.read_plain(source, f"{old_linear}.{leaf}")
                if part is None:
                    writer.put(stored, meta.to_stored(result, name, tensor))
                    continue
                experts = packed.setdefault(stored, [[] for _ in kept])
                experts[number].append(tensor)
                if all(len(parts) == part.parts for parts in experts):
                    wholes = [torch.cat([each.cpu() for each in parts]) for parts in packed.pop(stored)]
                    writer.put(stored, torch.stack([whole.T if part.transposed else whole for whole in wholes]))
