"""State shared by the parts of a recovery."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from compresskit import distributed
from compresskit.checkpoint.manifest import fingerprint
from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.machine.device import Where
from compresskit.machine.progress import ProgressBars
from compresskit.models.model import Model
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.reading import Data
from compresskit.recovery.request import RecoverRequest
from compresskit.recovery.texts import Texts, texts_of


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

    @cached_property
    def texts(self) -> Texts:
        """The plain texts to learn beside or instead of instructions; all ranks ask for them first at the same time."""
        return texts_of(self.request, self.where, self.bars, self.seconds)

    @property
    def held_back(self) -> list[Sample]:
        """Samples that are never trained on: instructions, or texts where there are no instructions."""
        return self.data.held_back if self.request.options.data else self.texts.held_back
