"""Plain texts as training data: windows of the calibration text, and texts that the original model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from compresskit import calibration, distributed
from compresskit.calibration.sources import TextRequest
from compresskit.machine.device import Where
from compresskit.machine.progress import ProgressBars, timed
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.held_back import hold_back
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.request import RecoverRequest

if TYPE_CHECKING:
    from torch import Tensor


class Texts(NamedTuple):
    """The plain texts of a recovery, each learned whole."""

    windows: list[Sample]
    """Of the calibration text."""
    own: list[Sample]
    """Sampled from the original."""
    held_back: list[Sample]
    """Of both, where there is no instruction data to hold back."""


def texts_of(request: RecoverRequest, where: Where, bars: ProgressBars, seconds: dict[str, float]) -> Texts:
    """Draw the texts; all ranks ask for them at the same time. `seconds` takes the time of each part."""
    options, found = request.options, []
    if options.text_samples:
        with timed(seconds, "text"):
            found += _whole(calibration_windows(request, where, bars, options.text_samples), "text")
    if options.self_samples:
        with timed(seconds, "sampling"):
            found += _whole(_own_tokens(request, where, bars), "self")
    kept, held = hold_back(found, 0.0 if options.data else options.held_back, options.seed)
    windows, own = ([each for each in kept if each.instruction.source == source] for source in ("text", "self"))
    return Texts(windows, own, held)


def calibration_windows(request: RecoverRequest, where: Where, bars: ProgressBars, count: int) -> Tensor:
    """Windows of the calibration text, (count, tokens) int64; of several ranks the first draws them."""
    assert request.original is not None
    options, original, progress = request.options, request.original, bars.of("sampling text")
    asked = TextRequest(options.calibration, count, options.sequence_length, options.seed, count)
    return distributed.from_first(lambda: calibration.calibrate(asked, original, where, progress).tokens)


def _own_tokens(request: RecoverRequest, where: Where, bars: ProgressBars) -> Tensor:
    """Fresh texts of the original, with another seed than the calibration text's, (texts, tokens) int64."""
    from compresskit.calibration.sampling import Sampling, self_tokens

    assert request.original is not None
    options, original = request.options, request.original
    how = Sampling(options.seed + 1, where, bars.of("sampling text"))
    return distributed.from_first(lambda: self_tokens(original, (options.self_samples, options.sequence_length), how)[0])


def _whole(tokens: Tensor, source: str) -> list[Sample]:
    """Samples that are learned whole, of tokens (windows, length)."""
    return [Sample(Instruction(i, source, [], "", source), text, 1) for i, text in enumerate(tokens.tolist())]
