"""Measure the memory that a forward pass needs and the memory that is available."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskit.machine.memory import free_memory_bytes


class LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, tracks the bytes of tensors that operations create; `peak` is their largest sum at any time.

    Tensors that existed before and scratch memory inside kernels are not counted. The result is the same on every machine,
    unlike the process's resident size, which depends on what the allocator kept from earlier work.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> LiveTensors:
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation; a result that views or changes an argument shares that argument's storage."""
        old = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf.untyped_storage(), old)
        return result

    def _follow(self, storage: torch.UntypedStorage, old: set[int]) -> None:
        key = id(storage)  # torch keeps one object per storage, for the storage's lifetime
        if key in old or key in self._known:
            return
        self._known.add(key)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, storage.nbytes()).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def weight_bytes(network: nn.Module) -> int:
    """Bytes of parameters and buffers; tied tensors count once."""
    storages = {id(s): s.nbytes() for s in (t.untyped_storage() for t in (*network.parameters(), *network.buffers()))}
    return sum(storages.values())


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device; None if the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    return free_memory_bytes()
