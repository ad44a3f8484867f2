"""Several processes work on one request: `torchrun --nproc-per-node N -m compresskit ...`.

Every rank runs the same code on its own share of the text. Sums of statistics go over all ranks, rows of solves are dealt out
and exchanged, gradients of a training step are added in the order of one rank, and the first rank alone writes. A process
without torchrun is the only rank of one, and every function here then returns at once. Only this file and machine/sharding.py use
torch.distributed.

The same bytes come out for any number of ranks, because no result depends on who computed it or on the order of a sum:
statistics add float32 sums of one micro-batch each in float64, which holds them exactly unless one entry's sums span more than
2^25, and solves are cut into pieces of a fixed size.

A rank that fails says so once (`is_first_to_fail`) and ends. Its connections close, so all others fail in their next exchange;
they then end without a word.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from compresskit.errors import RankError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
PATIENCE = timedelta(days=2)
"""How long a rank waits for another: the first may sample text for hours. A rank that has ended is noticed at once."""
STORE_PATIENCE = timedelta(seconds=5)
RANK, COUNT, LOCAL_RANK, RESTARTS = "RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"
"""Environment variables that torchrun sets."""


def asked_count() -> int:
    """Number of processes that torchrun started; 1 without it."""
    return int(os.environ.get(COUNT, "1"))


def is_restarted() -> bool:
    """Whether torchrun has started the processes again after a failure (`--max-restarts`)."""
    return asked_count() > 1 and int(os.environ.get(RESTARTS, "0")) > 0


def local_rank() -> int:
    """This process's number on its machine: that of its accelerator."""
    return int(os.environ.get(LOCAL_RANK, "0")) if asked_count() > 1 else 0


@contextmanager
def joined() -> Iterator[None]:
    """Join the other processes that torchrun has started, if it has.

    Raises:
        RankError: the others cannot be reached.
    """
    if asked_count() == 1:
        yield
        return
    import torch
    import torch.distributed as group

    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with noticing():
        group.init_process_group(backend, timeout=PATIENCE)
    yield
    with noticing():
        group.barrier()
        group.destroy_process_group()


def count() -> int:
    """Number of ranks at work."""
    group = _group()
    return int(group.get_world_size()) if group else 1


def rank() -> int:
    """This process's number, from 0."""
    group = _group()
    return int(group.get_rank()) if group else 0


def is_first() -> bool:
    """Whether this is the rank that writes files and speaks."""
    return rank() == 0


def _group() -> Any:
    """torch.distributed with this process in it, or None; torch is not imported for the question."""
    group = sys.modules.get("torch.distributed")
    return group if group is not None and group.is_available() and group.is_initialized() else None


@contextmanager
def noticing() -> Iterator[None]:
    """Name the failure of an exchange: another rank has ended."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed raises it and its subclasses
        reason = (str(error).splitlines() or [""])[0]
        raise RankError(
            f"another process of this run has ended ({reason}); what is finished stays: the same command with --resume goes on"
        ) from error


def is_first_to_fail() -> bool:
    """Whether no other rank has said yet why the run ends; asked once, by a rank that is about to say it."""
    if asked_count() == 1:
        return True
    import torch.distributed as group

    try:
        port = int(os.environ["MASTER_PORT"])
        store = group.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], port, is_master=False, timeout=STORE_PATIENCE
        )
        return int(store.add(f"compresskit/failures/{os.environ.get(RESTARTS, '0')}", 1)) == 1
    except (RuntimeError, KeyError, ValueError):  # torchrun itself has gone: rather said twice than not at all
        return True


def wait() -> None:
    """Wait until every rank has come here; what the first wrote before is then there for all."""
    group = _group()
    if group:
        with noticing():
            group.barrier()


def from_first(make: Callable[[], T]) -> T:
    """What the first rank makes, or None of what it only does, on every rank; the others wait for it. It must be picklable."""
    group = _group()
    if not group:
        return make()
    made = [make() if is_first() else None]
    with noticing():
        group.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]


def after_first(make: Callable[[], T]) -> T:
    """Make something on every rank, on the first rank before all others: what it leaves in caches is there for them."""
    if not is_first():
        wait()
    made = make()
    if is_first():
        wait()
    return made


def own(total: int) -> range:
    """Numbers, below `total`, of the pieces that this rank takes."""
    return range(rank(), total, count())


def total(value: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place; in float64 or whole numbers, so that the order does not matter."""
    group = _group()
    if group:
        with noticing():
            group.all_reduce(value)
    return value


def total_of(number: int) -> int:
    """Sum of a whole number over all ranks."""
    return sum(every(number))


def every(value: T) -> list[T]:
    """What each rank has, in their order; it must be picklable."""
    group = _group()
    if not group:
        return [value]
    found: list[Any] = [None] * count()
    with noticing():
        group.all_gather_object(found, value)
    return found


def in_order(values: Sequence[T], total: int) -> list[T]:
    """All values of `total` pieces, in the order of the pieces; `values` are those of this rank's own."""
    found: dict[int, T] = {}
    for start, each in enumerate(every(list(values))):
        found.update(zip(range(start, total, count()), each, strict=True))
    return [found[number] for number in range(total)]


def pieces(total: int, size: int) -> Iterator[slice]:
    """This rank's pieces of `total` rows, cut into pieces of a fixed size; `exchange` then gives all to all."""
    for number in own(-(-total // size)):
        yield slice(number * size, min((number + 1) * size, total))


def exchange(size: int, *results: Tensor) -> None:
    """Give every rank the rows that others computed, in place: results (rows, ...), cut as `pieces` cuts them."""
    group = _group()
    if not group:
        return
    for result in results:
        for number, start in enumerate(range(0, len(result), size)):
            send(result[start : start + size], number % count())


def send(value: Tensor, owner: int) -> None:
    """Give every rank the tensor of its owner, in place."""
    group = _group()
    if not group or not value.numel():
        return
    import torch

    sent = value.contiguous()
    with noticing():
        group.broadcast(sent.view(torch.uint8) if sent.dtype.itemsize == 1 else sent, src=owner)
    if sent is not value:
        value.copy_(sent)


def send_each(values: Sequence[Tensor]) -> None:
    """Give every rank the tensors of all pieces, in place; each comes from the rank that `own` gives its number."""
    for number, value in enumerate(values):
        send(value, number % count())


def add_in_order(total: Tensor | None, like: Tensor, value: Tensor | None, sources: Sequence[int], owner: int) -> Tensor | None:
    """Add the values of some ranks, in this order, to the owner's total, in place.

    `like` has their shape and dtype; `value` is this rank's, if it is a source, and may become the total.

    Returns:
        The total on the owner, what was given elsewhere; None where nothing has been added yet.
    """
    for source in sources:
        if owner == rank():
            found = value if source == owner else _received(like, source)
            total = found if total is None else total.add_(found)  # type: ignore[arg-type]
        elif source == rank() and value is not None:
            with noticing():
                _group().send(_as_bytes(value), owner)
    return total


def add_everywhere(total: Tensor, value: Tensor | None, sources: int) -> None:
    """Add to every rank's total, in place, the values of the first `sources` ranks, in their order; `value`: this rank's."""
    for source in range(sources):
        found = value if source == rank() else total.new_empty(total.shape)
        assert found is not None
        send(found, source)
        total.add_(found)


def swapped(value: Tensor) -> Tensor:
    """Of a row cut in as many pieces as there are ranks, this rank's piece of every rank's row, in the order of the ranks."""
    import torch

    found = torch.empty_like(value)
    with noticing():
        _group().all_to_all_single(found, value)
    return found


def _received(like: Tensor, source: int) -> Tensor:
    """A tensor from another rank, with the shape and dtype of `like`."""
    import torch

    found = torch.empty_like(like, memory_format=torch.contiguous_format)
    with noticing():
        _group().recv(_as_bytes(found), source)
    return found


def _as_bytes(value: Tensor) -> Tensor:
    """The same memory, or a copy of it in order, as bytes: every backend sends these."""
    import torch

    return value.contiguous().flatten().view(torch.uint8)


def own_device(name: str) -> str:
    """The name of a device, with this rank's number where `cuda` is to mean its own."""
    return f"cuda:{local_rank()}" if name == "cuda" and asked_count() > 1 else name
