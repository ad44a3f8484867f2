"""`merge --validation`: choose the factor and the weights of a merge by the loss of the merged model on held-back text.

    scaling    every factor of a grid times the method's own, with the weights as they are
    weights    one source after the other: one step up, and if that is no better one step down, from the best so far

A candidate is merged, written and scored as its result would be. Task arithmetic (arXiv 2212.04089, section 2) and the other
methods choose their factor by a task metric on held-out data; the mean token loss needs no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from compresskit import calibration
from compresskit.checkpoint.reader import Checkpoint
from compresskit.errors import NumericalError, RequestError
from compresskit.evaluation.request import check_evaluation_text, read_evaluation_text
from compresskit.formats.peft import open_adapter
from compresskit.machine.device import choose_device
from compresskit.models.load import attached, bind, open_model
from compresskit.models.model import Model
from compresskit.task_vectors.alpha import check_scored
from compresskit.task_vectors.merge_request import FLAG, SCALINGS, most_candidates
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.request import MergeOptions
from compresskit.task_vectors.vector import TaskVector, named_base

STEP = 1.5
"""Factor by which the weight of a source is tried larger and smaller."""
WEIGHT_DIGITS = 6
"""Digits of a weight in the report; all of them are in the settings."""
NO_BASE = "pass --base for --validation"
ADAPTERS_ONLY = "--validation scores plain LoRA adapters of linears only; leave it out"
Losses = list[float]
"""Mean token loss in nats of each validation text."""


def check_validation(vectors: Sequence[TaskVector], options: MergeOptions) -> None:
    """Refuse, before any work, texts that cannot judge a merge and adapters that cannot be scored.

    Raises:
        RequestError: a text would be sampled from the model itself, an adapter names no base or is no plain LoRA.
        CalibrationError: a text is unusable.
    """
    for text in options.validation:
        check_evaluation_text(FLAG, text, options.sequence_length)
    for vector in vectors if options.validation else ():
        if vector.is_adapter:
            check_scored(vector, ADAPTERS_ONLY)
    if options.validation and vectors[0].is_adapter and not options.base:
        named_base(vectors[0], NO_BASE)


def choose(
    method: MergeMethod, sources: int, score: Callable[[MergeMethod], Losses], on_candidate: Callable[[int, int], None]
) -> tuple[MergeMethod, list[dict[str, Any]]]:
    """Try the grid of factors, then the steps of the weights. `score` may raise NumericalError for what breaks the model.

    `on_candidate` is called with (scored, at most to score) before each candidate.

    Returns:
        (the method with the least mean loss, of every candidate its settings and losses, None where there is no finite loss).

    Raises:
        NumericalError: no candidate has a finite loss.
    """
    best, least, found = method, math.inf, list[dict[str, Any]]()

    def is_better(candidate: MergeMethod) -> bool:
        nonlocal best, least
        on_candidate(len(found), most_candidates(sources))
        try:
            losses = score(candidate)
        except NumericalError:
            losses = []
        mean = sum(losses) / len(losses) if losses else None
        weights = [round(float(each), WEIGHT_DIGITS) for each in candidate.source_weights(sources)]
        found.append({"scaling": candidate.scaling, "weights": weights, "loss": mean, "losses": losses or None})
        if mean is None or not mean < least:
            return False
        best, least = candidate, mean
        return True

    for factor in SCALINGS:
        is_better(method.model_copy(update={"scaling": factor * method.scaling}))
    if math.isinf(least):
        raise NumericalError(f"{FLAG}: no candidate gives a finite loss; check the sources and the base")
    for source in range(sources):
        for step in (STEP, 1 / STEP):
            weights = list(best.weights or [1.0] * sources)
            weights[source] *= step
            if is_better(best.model_copy(update={"weights": tuple(weights)})):
                break
    return best, found


class Scorer:
    """Scores folders that a merge wrote on the validation texts."""

    def __init__(self, base: Checkpoint, is_adapter: bool, options: MergeOptions):
        """`base`: the model that the sources were fine-tuned from. Reads the texts."""
        import torch

        from compresskit.evaluation.language_modelling import cut_windows

        self.base, self.is_adapter, self.own_code = base, is_adapter, options.trust_remote_code
        self.where = choose_device(options.device, options.dtype, base.dtypes, self.own_code)
        self.windows = []
        for spec in options.validation:
            ids = calibration.encode(base.folder, read_evaluation_text(spec)[0], True, self.own_code)
            if len(ids) < options.sequence_length:
                what = f"has {len(ids)} tokens, a window takes {options.sequence_length}"
                raise RequestError(f"{FLAG} {spec}: {what}; give more text, or lower --sequence-length")
            self.windows.append(cut_windows(torch.tensor(ids), options.sequence_length, options.windows))

    def model(self, folder: Path) -> Model:
        """The model that a merged adapter or checkpoint makes."""
        if not self.is_adapter:
            return open_model(folder, self.own_code)
        return attached(bind(self.base, self.own_code), open_adapter(folder))

    def losses(self, folder: Path) -> Losses:
        """Loss of each text; raises NumericalError where it is not finite."""
        from compresskit.evaluation.language_modelling import score

        return [math.log(score(self.model(folder), windows, self.where).perplexity) for windows in self.windows]
