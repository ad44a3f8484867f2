"""`--alpha auto`: choose the scale factor by the loss of the model with the vector, on a small validation text.

ComPEFT, arXiv 2311.13171, section 3.1, chooses by a task metric; the mean token loss needs no task.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from compresskit import calibration
from compresskit.checkpoint.reader import Checkpoint
from compresskit.errors import NumericalError, RequestError
from compresskit.evaluation.request import read_evaluation_text
from compresskit.formats.adapter_kinds import check_plain
from compresskit.formats.peft import CONFIG
from compresskit.machine.device import choose_device
from compresskit.models.load import attached, bind
from compresskit.models.model import Model
from compresskit.task_vectors.apply import applied_adapter, applied_checkpoint
from compresskit.task_vectors.compeft import ALPHAS
from compresskit.task_vectors.request import TernaryOptions
from compresskit.task_vectors.vector import TaskVector, TernaryVector, adapter_config

LINEARS = (".lora_A.weight", ".lora_B.weight")
"""How the names of a linear's factors end."""
ALPHA_AUTO = "--alpha auto scores plain LoRA adapters of linears only; pass a number"
"""Why other adapters are refused, and what to do."""


def check_scored(vector: TaskVector, what: str = ALPHA_AUTO) -> None:
    """Raise RequestError, which says `what`, if the model with this kind of adapter cannot be scored."""
    try:
        check_plain(vector.folder / CONFIG, adapter_config(vector))
    except RequestError as error:
        raise RequestError(f"{vector.folder / CONFIG}: {what}") from error
    for name in (*vector.specs, *vector.dense):
        if not name.endswith(LINEARS):
            raise RequestError(f"{vector.folder}: holds {name}, {what}")


def model_with(vector: TernaryVector, base: Checkpoint, alpha: float, trust_remote_code: bool) -> Model:
    """The base with the vector times alpha."""
    if not vector.is_adapter:
        return bind(applied_checkpoint(base, vector, alpha), trust_remote_code)
    return attached(bind(base, trust_remote_code), applied_adapter(vector, adapter_config(vector), alpha))


def pick_alpha(
    vector: TernaryVector, base: Checkpoint, options: TernaryOptions, on_alpha: Callable[[int, int], None]
) -> tuple[float, dict[float, float]]:
    """Score every alpha of the grid on the validation text. `vector` has alpha 1.

    `on_alpha` is called with (scored, total) before each alpha.

    Returns:
        (the best alpha, the mean token loss in nats of every alpha with a finite loss).

    Raises:
        NumericalError: no alpha gives a finite loss.
        RequestError: this kind of adapter cannot be scored.
    """
    import torch

    from compresskit.evaluation.language_modelling import cut_windows, score

    assert options.validation is not None
    own_code = options.trust_remote_code
    stored = model_with(vector, base, 1.0, own_code).checkpoint.dtypes
    where = choose_device(options.device, options.dtype, stored, own_code)
    text, _ = read_evaluation_text(options.validation)
    ids = calibration.encode(base.folder, text, True, own_code)
    windows = cut_windows(torch.tensor(ids), options.sequence_length, options.windows)
    losses = {}
    for number, alpha in enumerate(ALPHAS):
        on_alpha(number, len(ALPHAS))
        model = model_with(vector, base, alpha, own_code)
        try:
            losses[alpha] = math.log(score(model, windows, where).perplexity)
        except NumericalError:
            continue  # this alpha breaks the model
    if not losses:
        raise NumericalError(f"{vector.folder}: no factor of the grid gives a finite loss; pass --alpha, or check the vector")
    return min(losses, key=lambda alpha: losses[alpha]), losses
