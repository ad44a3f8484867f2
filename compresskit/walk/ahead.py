"""Fetch the next block of a walk while this one is computed.

On the CPU a thread brings the block's bytes into the page cache, which is memory that the system can take back. On an
accelerator it reads the block's weights, copies them from pinned memory on a stream of its own, and the walk waits for that
stream: one more block on the device, in the dtype of the computation. Where the device has no room for it, and for weights
that are computed from others, only the page cache is filled.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from functools import partial
from threading import Event, Thread
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.checkpoint.read_ahead import held_names, read_ahead
from compresskit.models import meta
from compresskit.models.model import Model

STREAMED = ("cuda", "xpu")
"""Devices on which a copy can run beside the computation."""
ROOM = 3
"""Free device memory, in blocks, without which no block is fetched: one ahead, and what the work on this one needs more."""


class Ahead:
    """One block ahead of a walk: `begin` to fetch it, `take` what is there of it."""

    def __init__(self, network: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        self.network, self.device, self.dtype = network, device, dtype
        self.stop = Event()
        self.fetched: Future[dict[str, Tensor]] = Future()
        self.stream: Any = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.set()

    def begin(self, source: Model, index: int) -> None:
        """Begin to fetch block `index` of this model; nothing else is fetched any more."""
        self.stop.set()
        self.stop, self.fetched, self.stream = Event(), Future(), None
        stored = held_names(source.checkpoint, f"{source.stored_blocks}{index}.")
        wanted = meta.wanted(source, self.network, source.block_name(index))
        if self._has_room(source, wanted):
            self.stream = torch.get_device_module(self.device).Stream(self.device)
            work = partial(_fetch, source, wanted, self.dtype, self.stream, self.stop, self.fetched)
        else:
            self.fetched.set_result({})
            work = partial(read_ahead, source.checkpoint, stored, self.stop)
        Thread(target=work, name="read ahead", daemon=True).start()

    def _has_room(self, source: Model, names: list[str]) -> bool:
        if self.device.type not in STREAMED:
            return False
        needed = sum(source.spec_of(name).elements for name in names if not source.is_low_bit(name.removesuffix(".weight")))
        free, _ = torch.get_device_module(self.device).mem_get_info(self.device)
        return bool(free > ROOM * needed * self.dtype.itemsize)

    def take(self) -> Mapping[str, Tensor]:
        """The block's weights by plain name, as far as they are on the device; raises what reading them raises."""
        found = self.fetched.result()
        if self.stream is not None:
            here = torch.get_device_module(self.device).current_stream(self.device)
            here.wait_stream(self.stream)
            for tensor in found.values():
                tensor.record_stream(here)  # its memory is not given to the other stream while this one uses it
        self.fetched = Future()
        return found


def _fetch(
    source: Model, names: list[str], dtype: torch.dtype, stream: Any, stop: Event, fetched: Future[dict[str, Tensor]]
) -> None:
    found = {}
    try:
        with torch.no_grad(), torch.get_device_module(stream.device).stream(stream):
            for name in names:
                if stop.is_set():
                    return
                found[name] = meta.read_on(source, name, stream.device, dtype, pinned=True)
    except Exception as error:  # raised where the block is taken
        fetched.set_exception(error)
    else:
        fetched.set_result(found)
