"""A file before it is written: its tensors in order, each made when its turn comes, and what stands beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BITS_PER_BYTE = 8


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file."""

    name: str
    shape: tuple[int, ...]
    """Outputs first."""
    kind: str
    """Its type, as the format names it."""
    bytes: int
    make: Callable[[], tuple[NDArray[np.generic], float]]
    """Gives (what is stored, the relative error of its values to those of the source, 0 where they are equal)."""

    @property
    def elements(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class PlannedFile:
    """One file."""

    architecture: str
    """What the format calls the model's family."""
    tensors: list[PlannedTensor]
    describe: Callable[[Any], None]
    """Adds what stands beside the tensors to the writer of the format."""
    notes: list[str] = field(default_factory=list)
    """What a user has to know, one sentence each."""

    @property
    def kinds(self) -> dict[str, int]:
        """Number of tensors of each type."""
        return dict(Counter(tensor.kind for tensor in self.tensors))

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Size of the tensors, without headers."""
        return sum(tensor.bytes for tensor in self.tensors)


def facts(planned: PlannedFile, errors: dict[str, float]) -> dict[str, Any]:
    """What is reported of a written file; `errors`: relative errors of the tensors that were rounded, by name."""
    lost = {name: error for name, error in errors.items() if error}
    worst = max(lost, key=lambda name: lost[name], default=None)
    return {
        "architecture": planned.architecture,
        "tensor_types": planned.kinds,
        "bits_per_weight": BITS_PER_BYTE * planned.bytes / planned.parameters,
        "exact": not lost,
        "largest_rounding_error": lost[worst] if worst else 0.0,
        "largest_rounding_error_of": worst,
        "rounding_errors": lost,
        "notes": planned.notes,
    }
