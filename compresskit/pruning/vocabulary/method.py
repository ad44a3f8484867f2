"""Vocabulary: remove the tokens that a text never needs from the tokenizer, the embedding and the head.

    K = closure(R + T),    E' = E[K],    head' = head[K],    id' = rank of id in K                                (1)

symbol   meaning                                                                    name here
R        tokens that always stay: single bytes, special and added tokens, what      required
         config.json names, the words of the chat template
T        tokens of the texts, the most frequent first where a share is to go        counts
closure  with each token the shorter ones that merging makes it of (tokenizer.py)
E, head  embedding and head, (tokens, hidden); one matrix where they are tied
K        tokens that stay, in their old order                                       kept

A text whose tokens all stay is cut into the same tokens as before, under their new numbers, and every logit of a kept token
is the same number. Another text is cut into shorter tokens, in the end into bytes; none is lost. No paper; what it measured is
in docs/evidence/prune.md.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from compresskit.stages import Method


class Vocabulary(Method, frozen=True):
    """Remove tokens."""

    keep_from: tuple[str, ...] = ()
    """Text whose tokens stay: FILE.txt, .jsonl or .parquet, hub:DATASET, builtin; A+B joins; may be repeated."""
    keep_scripts: tuple[str, ...] = ()
    """Script whose tokens stay, as Unicode names it, such as latin or cyrillic; may be repeated."""
    sparsity: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the tokens to remove, the rarest first; default: all that the texts and scripts do not need."""
    round_to: Annotated[int, Field(ge=1)] = 64
    """The number of tokens is a multiple of this, where there are enough."""


class VocabularyOptions(BaseModel):
    """What `prune vocabulary` takes besides the method's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_shard_size: str = "5GB"
    """Maximum size of a weight file."""
    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
