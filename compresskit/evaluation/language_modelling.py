"""Perplexity, KL divergence, top-1 agreement and Matrix Nuclear-Norm of a model of any size, block by block.

    perplexity = exp(mean over windows of mean over t < length of -log p(x_t+1 | x_1..t))
    KL         = mean over all positions of sum_v P_reference(v) * (log P_reference(v) - log P(v))     in nats
    top-1      = share of all positions with the same most probable token

The windows are consecutive and do not overlap. No start token is added beyond those that the tokenizer writes.
The model is walked first, then the reference. Only the last hidden states of both are kept; their logits are computed
side by side, a few positions at a time. Memory: one block, two embeddings and heads, the hidden states of all windows
twice, and about six times `CHUNK_BYTES`.

Differs from arXiv 2410.10672: its code takes the Matrix Nuclear-Norm after the final norm; this code takes it before,
on the output of the blocks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from compresskit import distributed
from compresskit.errors import NumericalError, RequestError
from compresskit.evaluation.nuclear_norm import matrix_nuclear_norm
from compresskit.evaluation.request import CHUNK_BYTES
from compresskit.evaluation.scores import Scores, check_comparable, check_context
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.walk.cost import micro_batch_size
from compresskit.walk.walk import Walk, windows_of

FLOAT32_BYTES = 4
LARGEST_LOSS = 700.0
"""exp of a larger loss overflows float64."""

OnBlock = Callable[[int, int], None]
"""Called with (blocks done, total blocks) before each block and at the end."""


def cut_windows(ids: Tensor, length: int, count: int) -> Tensor:
    """Cut ids (tokens,) into the first `count` consecutive windows, or fewer if the text is shorter.

    Returns:
        (windows, length), a view of ids.

    Raises:
        RequestError: the text does not fill one window.
    """
    windows = min(count, len(ids) // length)
    if windows < 1:
        raise RequestError(
            f"the evaluation text has {len(ids)} tokens, at least one window of {length} is needed; "
            "give a longer --data, or lower --sequence-length"
        )
    return ids[: windows * length].view(windows, length)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats: logits (tokens, vocabulary), targets (tokens,) -> (tokens,)."""
    return functional.cross_entropy(logits, targets, reduction="none")


def token_divergences(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(reference || model) in nats: both (tokens, vocabulary) -> (tokens,)."""
    log_model, log_reference = logits.log_softmax(dim=-1), reference_logits.log_softmax(dim=-1)
    return functional.kl_div(log_model, log_reference, reduction="none", log_target=True).sum(dim=-1)


def score(
    model: Model,
    windows: Tensor,
    where: Where,
    reference: Model | None = None,
    on_block: OnBlock | None = None,
) -> Scores:
    """Score the model on windows (windows, length) int64, against the reference if given.

    Returns:
        Perplexity and nuclear norm; with a reference also KL in nats per token, top-1 agreement as a share, and ratios.

    Raises:
        RequestError: the vocabularies differ, or the windows hold unknown tokens or exceed the context. Raised before any work.
        NumericalError: NaN or infinity in weights, activations or the loss.
    """
    models = [model] if reference is None else [model, reference]
    _check(models, windows)
    size = min(micro_batch_size(each, windows.shape[1]) for each in models)  # equal, for the side-by-side comparison
    walks = [Walk(each, windows, where, size) for each in models]
    _walk_all(walks, on_block or (lambda done, total: None))
    norms = [_nuclear_norm(walk) for walk in walks]
    sums = _sums(walks)
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    perplexities = [_perplexity(each, loss / predictions) for each, loss in zip(models, sums.losses, strict=True)]
    compared = {}
    if reference is not None:
        compared = {
            "kl": sums.divergence / windows.numel(),
            "top1_agreement": sums.same / windows.numel(),
            "perplexity_ratio": perplexities[0] / perplexities[1],
            "reference_perplexity": perplexities[1],
            "reference_nuclear_norm": norms[1],
        }
    vocabulary = model.vocabulary
    return Scores(
        perplexity=perplexities[0], tokens=windows.numel(), nuclear_norm=norms[0], vocabulary_size=vocabulary, **compared
    )


def _nuclear_norm(walk: Walk) -> float:
    """Mean over windows of the Matrix Nuclear-Norm of the last block's output."""
    found = [[matrix_nuclear_norm(window) for window in windows_of(batch)] for batch in walk.hidden]
    return statistics.fmean(norm for norms in distributed.in_order(found, len(walk.all_batches)) for norm in norms)


def _check(models: list[Model], windows: Tensor) -> None:
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise RequestError(f"windows have shape {list(windows.shape)}; expected (windows, length) with a length of at least 2")
    check_comparable(models[0], models[-1])
    for model in models:
        check_context(model, windows.shape[1])
    largest, vocabulary = int(windows.max()), models[0].vocabulary
    if largest >= vocabulary:
        raise RequestError(
            f"{models[0].checkpoint.folder}: the text holds token {largest}, its vocabulary has {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )


def _walk_all(walks: list[Walk], on_block: OnBlock) -> None:
    """Walk the models one after the other; each walk's `hidden` then holds the output of its last block."""
    total = sum(walk.model.block_count for walk in walks)
    done = 0
    for walk in walks:
        for _ in walk:
            on_block(done, total)
            done += 1
    on_block(total, total)


@dataclass
class _Sums:
    """Sums over the positions of some windows, in float64."""

    losses: list[float]
    """One sum per model."""
    divergence: float = 0.0
    same: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        losses = [own + others for own, others in zip(self.losses, other.losses, strict=True)]
        return _Sums(losses, self.divergence + other.divergence, self.same + other.same)


@torch.no_grad()
def _sums(walks: list[Walk]) -> _Sums:
    """Sums over all windows: micro-batch by micro-batch, then in their order, whichever rank computed them."""
    found = []
    vocabulary = walks[0].model.vocabulary
    for outputs in zip(*(walk.heads() for walk in walks), strict=True):
        sums = _Sums([0.0] * len(walks))
        for index, window in enumerate(outputs[0][0]):
            for rows in chunks(len(window), vocabulary):
                logits = [head(hidden[..., index : index + 1, rows, :]).float()[0] for _, hidden, head in outputs]
                _add_rows(sums, window[rows.start + 1 : rows.stop + 1].to(logits[0].device), logits)
        found.append(sums)
    return sum(distributed.in_order(found, len(walks[0].all_batches)), start=_Sums([0.0] * len(walks)))


def _add_rows(sums: _Sums, targets: Tensor, logits: list[Tensor]) -> None:
    """Add some positions of a window, logits (rows, vocabulary) per model; the window's last position has no target."""
    for index, each in enumerate(logits):
        sums.losses[index] += float(token_losses(each[: len(targets)], targets).double().sum())
    if len(logits) > 1:
        found, wanted = logits
        sums.divergence += float(token_divergences(found, wanted).double().sum())
        sums.same += float((found.argmax(dim=-1) == wanted.argmax(dim=-1)).sum())


def chunks(length: int, vocabulary: int) -> Iterator[slice]:
    """Parts of a window's positions whose float32 logits take at most about `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (vocabulary * FLOAT32_BYTES))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _perplexity(model: Model, loss: float) -> float:
    if not loss < LARGEST_LOSS:  # also catches NaN
        raise NumericalError(
            f"{model.checkpoint.folder}: the mean loss is {loss:g} nats a token, no perplexity can be stated; "
            "use an intact model, or --dtype float32"
        )
    return math.exp(loss)
