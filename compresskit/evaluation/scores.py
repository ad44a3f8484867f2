"""Language modelling scores, checks that two models are comparable, and collapse detection. No torch."""

from __future__ import annotations

from pydantic import BaseModel

from compresskit.errors import RequestError
from compresskit.models.model import Model

COLLAPSED_RATIO = 10.0
"""A collapsed model's perplexity ratio: usable models measure below 3, broken 2-bit ones in the hundreds."""
COLLAPSED_KL = 3.0
"""Nats per token: usable 2-bit models measure near 1, those of GPTQ and RTN 4 to 10."""
COLLAPSED_AGREEMENT = 0.1
"""Top-1 agreement below which the model predicts little more than the most common tokens."""


class Scores(BaseModel, frozen=True):
    """Language modelling scores of one model; comparisons are None without a reference."""

    perplexity: float
    """exp of the mean cross-entropy over length - 1 predictions per window."""
    tokens: int
    """Number of tokens: windows times length."""
    nuclear_norm: float
    """Matrix Nuclear-Norm of the hidden states after the last block, before the final norm; mean over windows."""
    vocabulary_size: int
    kl: float | None = None
    """KL(reference || model) in nats per token, mean over all positions."""
    top1_agreement: float | None = None
    """Share of positions at which both models have the same most probable token."""
    perplexity_ratio: float | None = None
    """Perplexity divided by the reference's."""
    reference_perplexity: float | None = None
    reference_nuclear_norm: float | None = None


def context_length(model: Model) -> int | None:
    """Maximum number of tokens that the model supports, or None if its configuration does not say."""
    config = model.checkpoint.config
    stated = config.get("max_position_embeddings") or config.get("n_positions")
    return int(stated) if stated else None


def check_context(model: Model, length: int) -> None:
    """Raise RequestError if windows of `length` tokens exceed the model's context."""
    context = context_length(model)
    if context is not None and length > context:
        raise RequestError(
            f"{model.checkpoint.folder}: windows of {length} tokens exceed its context of {context}; "
            f"pass --sequence-length {context} or less"
        )


def check_comparable(model: Model, reference: Model) -> None:
    """Raise RequestError if the vocabularies of the two models differ."""
    sizes = [each.vocabulary for each in (model, reference)]
    if sizes[0] != sizes[1]:
        raise RequestError(
            f"{model.checkpoint.folder} has a vocabulary of {sizes[0]} tokens, {reference.checkpoint.folder} of {sizes[1]}; "
            "compare with the model it was made from; where tokens were removed, compare bits_per_byte of each without --against"
        )


def collapse_warning(scores: Scores) -> str | None:
    """Warn if the model has collapsed.

    A collapsed model is worse than a uniform guess over the vocabulary (while the reference is better), or its perplexity is
    more than `COLLAPSED_RATIO` times the reference's, or its top-1 agreement is below `COLLAPSED_AGREEMENT`, or its KL is
    above `COLLAPSED_KL`. Where the reference itself is no better than a uniform guess, its most probable tokens say nothing,
    so that agreement with them is not asked for.

    Returns:
        One sentence with the figure and its bound; None if the model has not collapsed.
    """
    found = None
    reference_is_worse = scores.reference_perplexity is not None and scores.reference_perplexity >= scores.vocabulary_size
    if scores.perplexity >= scores.vocabulary_size and not reference_is_worse:
        found = f"perplexity {scores.perplexity:.4g} is no better than a uniform guess over {scores.vocabulary_size} tokens"
    elif scores.perplexity_ratio is not None and scores.perplexity_ratio > COLLAPSED_RATIO:
        found = f"perplexity is {scores.perplexity_ratio:.4g} times the original's, more than {COLLAPSED_RATIO:g}"
    elif scores.top1_agreement is not None and scores.top1_agreement < COLLAPSED_AGREEMENT and not reference_is_worse:
        found = f"only {scores.top1_agreement:.1%} of its top-1 tokens are the original's, less than {COLLAPSED_AGREEMENT:.0%}"
    elif scores.kl is not None and scores.kl > COLLAPSED_KL:
        found = f"KL to the original is {scores.kl:.4g} nats a token, more than {COLLAPSED_KL:g}"
    return found and f"The model has collapsed: {found}; use a gentler setting, or recover it by fine-tuning."
