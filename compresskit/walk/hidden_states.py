"""Hidden states of a walk: in memory, or, where they would take much of it, in mapped files.

The system writes the pages of such a file to the disk and takes them back when something else needs memory. A value that is
replaced stays as it is until the next one comes: what was read of a block's inputs is not changed by its outputs.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from compresskit.checkpoint.whole_files import storing

GENERATIONS = 2
"""Values of one place that exist at a time: a block's input and its output."""


class MappedTensors(list[Any]):
    """A list of tensors, or of tuples with tensors in them, whose values lie in files of `folder`, one for each.

    The files lose their names as soon as they are mapped, so that they are gone with the process, however that ends. Their
    space is reserved: a full disk gives a StorageError, not a signal.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.places: dict[tuple[Any, ...], Tensor] = {}
        self.turns: dict[tuple[int, ...], int] = {}

    def append(self, value: Any) -> None:
        """Copy a value to the file, at the end of the list."""
        super().append(self._kept((len(self),), value))

    def __setitem__(self, index: SupportsIndex | slice, value: Any) -> None:
        """Copy a value to the file, or values to a slice of the list."""
        if isinstance(index, slice):
            super().__setitem__(index, self._all_kept(range(len(self))[index], value))
        else:
            super().__setitem__(index, self._kept((range(len(self))[index],), value))

    def _all_kept(self, numbers: range, values: Iterable[Any]) -> list[Any]:
        return [self._kept((number,), value) for number, value in zip(numbers, values, strict=True)]

    def _kept(self, place: tuple[int, ...], value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._kept((*place, number), each) for number, each in enumerate(value))
        if not isinstance(value, Tensor) or not value.numel():
            return value
        self.turns[place] = turn = (self.turns.get(place, 0) + 1) % GENERATIONS
        key = (*place, turn, tuple(value.shape), value.dtype)
        if key not in self.places:
            self.places[key] = self._new(value)
        return self.places[key].copy_(value)

    def _new(self, like: Tensor) -> Tensor:
        """A tensor of this shape and dtype in a file of its own."""
        with storing(self.folder):
            self.folder.mkdir(exist_ok=True)
            file, name = tempfile.mkstemp(dir=self.folder)
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file, 0, like.nbytes)
                return torch.from_file(name, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)
            finally:
                os.close(file)
                Path(name).unlink()


def tensors_in(folder: Path | None) -> list[Any]:
    """An empty list whose tensors will lie in a file of this folder, or in memory if there is none."""
    return MappedTensors(folder) if folder else []


def beside(hidden: object) -> list[Any]:
    """An empty list for as many tensors as `hidden` has, in files of the same folder if its own lie in such."""
    return tensors_in(hidden.folder if isinstance(hidden, MappedTensors) else None)


def copied(hidden: Sequence[Any]) -> list[Any]:
    """A stream of its own that begins as `hidden`, which may then be replaced."""
    copies = beside(hidden)
    for each in hidden:
        copies.append(each)
    return copies
