"""What removing whole parts of a model shares, blocks or experts: the text, what is refused, the judgement at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from compresskit import distributed
from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint.writer import Writer
from compresskit.errors import UnsupportedArchitecture
from compresskit.job import HELD_BACK, Job
from compresskit.models.load import open_model
from compresskit.pruning.request import PruningRequest


@dataclass(frozen=True)
class PartsRequest(PruningRequest):
    """A request to remove whole parts of a model."""

    parts: ClassVar[str] = ""
    """What they are called in errors."""

    @property
    def walks(self) -> bool:
        """Whether anything of the work looks at calibration text."""
        return True

    @property
    def text(self) -> TextRequest:
        """Calibration text, and the windows on which the result is judged."""
        options, walked = self.options, self.options.samples if self.walks else 0
        return TextRequest(options.calibration, walked + HELD_BACK, options.sequence_length, options.seed, HELD_BACK)

    def check_known(self) -> None:
        """Raise UnsupportedArchitecture if nothing tells what a model with fewer parts is, or what text makes of a block."""
        model = self.model
        if model.code:
            raise UnsupportedArchitecture(
                f"{model.checkpoint.folder}: brings its own code, and what that makes of fewer {self.parts} is not known; prune "
                "its channels instead"
            )
        silent = [index for index in range(model.block_count) if not model.architecture.block(index).runs]
        if silent:
            raise UnsupportedArchitecture(
                f"{model.family}: block {silent[0]} runs on images alone, so that text says nothing of it; prune its channels "
                "instead"
            )


def judged(request: PartsRequest, job: Job, writer: Writer, facts: dict[str, Any]) -> dict[str, Any]:
    """Compare what is written with the source on the text that no step saw, and give OUT its final name.

    `facts`: of the result, for the manifest and for `--json`.

    Returns:
        The dictionary that `--json` prints, time and memory aside.
    """
    from compresskit.evaluation.language_modelling import score
    from compresskit.evaluation.scores import collapse_warning

    model = request.model
    distributed.wait()
    written = open_model(writer.partial, request.options.trust_remote_code)
    scores = score(written, job.tokens[-HELD_BACK:], job.where, reference=model)
    facts = facts | {
        "kl_held_back": scores.kl,
        "top1_held_back": scores.top1_agreement,
        "warning": collapse_warning(scores),
    }
    job.commit(writer, facts)
    return job.result((model.checkpoint.parameters, model.checkpoint.bytes), writer.written) | facts
