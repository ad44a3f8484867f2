"""State shared by the parts of a recovery."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from compresskit import calibration, distributed
from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint.manifest import fingerprint
from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.machine.device import Where
from compresskit.machine.progress import ProgressBars
from compresskit.models.model import Model
from compresskit.recovery.data.reading import Data
from compresskit.recovery.request import RecoverRequest

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Recovery:
    """A checked request with its data and results."""

    request: RecoverRequest
    data: Data
    where: Where
    work: WorkFolder
    bars: ProgressBars
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each part of the work, in this process only."""

    @property
    def original(self) -> Model:
        """The model before compression."""
        assert self.request.original is not None
        return self.request.original

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the weights, besides the models and the data."""
        return self.request.settings(self.where)

    @cached_property
    def key(self) -> str:
        """Fingerprint of everything that determines the result; an interrupted run is resumed only with the same key.

        All ranks ask for it first at the same time.
        """
        texts = [sample.tokens for sample in (*self.data.pool, *self.data.held_back)]
        return distributed.from_first(
            lambda: fingerprint(self.request.stage, self.settings, *(each.hashes for each in self.request.stores), texts)
        )

    def calibration_windows(self, count: int) -> Tensor:
        """Windows of the calibration text, (count, tokens) int64; of several ranks the first draws them."""
        options, progress = self.request.options, self.bars.of("sampling text")
        asked = TextRequest(options.calibration, count, options.sequence_length, options.seed, count)
        return distributed.from_first(lambda: calibration.calibrate(asked, self.original, self.where, progress).tokens)
