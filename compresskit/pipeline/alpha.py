"""`--alpha auto`: the factor of the scale by the loss of the model with the vector, on a small text of the user's.

ComPEFT, arXiv 2311.13171, section 3.1, picks by task metric; the mean token loss needs no task.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from compresskit import calibration
from compresskit.checkpoint.reader import Checkpoint, read_json
from compresskit.errors import NumericalError, RequestError
from compresskit.formats.peft import CONFIG, Adapter
from compresskit.opening import attached, bind
from compresskit.pipeline.device import choose_device
from compresskit.pipeline.evaluation import read_evaluation_text
from compresskit.progress import ProgressBars
from compresskit.quantize.compeft import ALPHAS
from compresskit.restored import Restored
from compresskit.task_vectors import TernaryVector

if TYPE_CHECKING:
    from compresskit.model import Model
    from compresskit.pipeline.ternary import TernaryOptions


def with_vector(base: Checkpoint, vector: TernaryVector, alpha: float, own_code: bool) -> Model:
    """The base with the vector times alpha, in memory; RequestError where the adapter is of a kind that cannot be scored."""
    path = vector.container.path
    if not vector.is_adapter:
        names = dict.fromkeys(vector.specs, path)
        merged = Restored(base.folder, base.config, base.tensors, base.file_of | names, None, vector, base, alpha)
        return bind(merged, own_code)
    config = read_json(vector.folder / CONFIG)
    if vector.dense or config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise RequestError(f"{vector.folder / CONFIG}: --alpha auto scores plain LoRA adapters only; pass a number")
    store = Restored(vector.folder, config, vector.specs, dict.fromkeys(vector.specs, path), None, vector, None, alpha)
    return attached(bind(base, own_code), Adapter(vector.folder, config, store))


def pick_alpha(
    vector: TernaryVector, base: Checkpoint, options: TernaryOptions, bars: ProgressBars
) -> tuple[float, dict[float, float]]:
    """Score every factor of the grid on the validation text. `vector`: with factor 1.

    Returns:
        (the best factor, the mean token loss in nats of every factor for which it is finite).

    Raises:
        NumericalError: no factor gives a finite loss.
        RequestError: the adapter is of a kind that cannot be scored.
    """
    import torch

    from compresskit.evaluate.language_modelling import cut_windows, score

    assert options.validation is not None
    model = with_vector(base, vector, 1.0, options.trust_remote_code)
    device, dtype = choose_device(options.device, options.dtype, model)
    text, _ = read_evaluation_text(options.validation)
    ids = calibration.encode(base.folder, text, True, options.trust_remote_code)
    windows = cut_windows(torch.tensor(ids), options.sequence_length, options.windows)
    losses = {}
    for number, alpha in enumerate(ALPHAS):
        bars("picking alpha", number, len(ALPHAS))
        model = with_vector(base, vector, alpha, options.trust_remote_code)
        try:
            losses[alpha] = math.log(score(model, windows, device, dtype).perplexity)
        except NumericalError:
            losses[alpha] = math.inf  # a factor that breaks the model is no candidate
    best = min(losses, key=lambda alpha: losses[alpha])
    if not math.isfinite(losses[best]):
        raise NumericalError(f"{vector.folder}: no factor of the grid gives a finite loss; pass --alpha, or check the vector")
    return best, {alpha: loss for alpha, loss in losses.items() if math.isfinite(loss)}
