"""Deal the weights of a network in training to the ranks, by torch's FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from compresskit import distributed

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def can_shard() -> bool:
    """Whether there are ranks to which a network's weights can be dealt, by a torch that lets us add up their gradients."""
    if distributed.count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "set_custom_reduce_scatter")


def shard(network: Module, parts: Mapping[Module, Any]) -> None:
    """Deal the weights of a network to the ranks (FSDP2): a part is whole only while it runs, the rest during a pass.

    `parts`: of each what adds up its gradients, called as torch's ReduceScatter.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(network.parameters()).device.type, (distributed.count(),))
    for part, adding in parts.items():
        fully_shard(part, mesh=mesh).set_custom_reduce_scatter(adding)
    fully_shard(network, mesh=mesh)


def whole(value: Tensor) -> Tensor:
    """A tensor with the pieces of all ranks; each takes part. Itself, if it is in no pieces."""
    if not hasattr(value, "full_tensor"):
        return value
    with distributed.noticing():
        found: Tensor = value.full_tensor()
    return found


def whole_on_first(value: Tensor) -> Tensor:
    """On the first rank the whole tensor, on the CPU; on others one of its shape that takes no memory."""
    found = whole(value)
    return found.cpu() if distributed.is_first() else found.new_zeros((), device="cpu").expand(found.shape)


def dealt_as(value: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that every rank has, dealt as a sharded parameter of its shape is."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    found: Tensor = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return found


@contextmanager
def noticing_lost() -> Iterator[None]:
    """Name the failure of an exchange that torch makes inside other work, whose own errors pass."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection")):
            raise
        with distributed.noticing():
            raise
