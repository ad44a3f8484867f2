"""What `plan` asks of a merge with `--validation`: its passes and its memory. The sizes of a merge depend on its sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compresskit.checkpoint import source
from compresskit.checkpoint.small_files import read_json
from compresskit.evaluation.request import check_evaluation_text, scoring_bytes
from compresskit.evaluation.scores import check_context
from compresskit.formats.peft import CONFIG
from compresskit.models.model import Model
from compresskit.task_vectors.request import MergeOptions
from compresskit.walk.cost import head_share, walk_bytes

FLAG = "--validation"
SCALINGS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Factors that `--validation` tries, as multiples of the method's own `scaling`."""
WEIGHT_STEPS = 2
"""Candidates of each source's weight: up, and down."""


def most_candidates(sources: int) -> int:
    """The largest number of candidates that are scored."""
    return len(SCALINGS) + WEIGHT_STEPS * sources


def base_name(first_source: str, options: MergeOptions) -> str | None:
    """The base on which candidates are scored: `base`, else the one that the first adapter names; None if it names none."""
    if options.base:
        return options.base
    config = source.resolve(first_source) / CONFIG
    found = read_json(config).get("base_model_name_or_path") if config.is_file() else None
    return found if isinstance(found, str) and found else None


@dataclass(frozen=True)
class MergeRequest:
    """A merge whose candidates are scored."""

    model: Model
    """The base."""
    sources: int
    options: MergeOptions

    fixed_seconds: ClassVar[float] = 5.0
    """Imports and files."""
    left_bytes: ClassVar[int] = 0
    """What stays in the process for the steps after it."""

    def check(self) -> None:
        """Refuse texts that cannot judge a model.

        Raises:
            RequestError: the context is too short, or a text would come from the model itself.
            CalibrationError: a text is unusable.
        """
        check_context(self.model, self.options.sequence_length)
        for text in self.options.validation:
            check_evaluation_text(FLAG, text, self.options.sequence_length)

    def passes(self) -> float:
        """Forward passes of one window through all blocks, if every candidate is tried."""
        windows = self.options.windows * len(self.options.validation)
        return windows * most_candidates(self.sources) * (1 + head_share(self.model))

    def peak_bytes(self) -> int:
        """Peak bytes of scoring, on top of the process as it is."""
        tokens = self.options.windows, self.options.sequence_length
        return max(walk_bytes(self.model, tokens, 0), scoring_bytes(self.model, tokens[0] * tokens[1]))
