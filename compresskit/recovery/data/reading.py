"""Prepare the instruction data of a recovery: read, remove duplicates, encode, hold a part back."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.models.tokenizer import check_vocabulary, open_tokenizer
from compresskit.recovery.data.duplicates import drop_duplicates
from compresskit.recovery.data.encoding import Sample, encode_samples
from compresskit.recovery.data.held_back import hold_back
from compresskit.recovery.data.instructions import read_instructions
from compresskit.recovery.request import RecoverRequest


@dataclass(frozen=True)
class Data:
    """The samples of a recovery."""

    pool: list[Sample]
    """Samples to choose from."""
    held_back: list[Sample]
    """Samples that are never trained on."""
    facts: dict[str, Any]
    """Facts about what was read and dropped."""


def read_data(request: RecoverRequest) -> Data:
    """Read the files of a request, remove duplicates, draw the pool, encode it, and hold a part back.

    Returns:
        The samples, and counts of those dropped; none where plain text alone is learned.

    Raises:
        RequestError: a file is unusable, or no sample is left.
        CheckpointError: the source has no usable tokenizer.
    """
    options = request.options
    if not options.data:
        return Data([], [], {"pool": 0})
    reading = read_instructions([Path(path).expanduser() for path in options.data])
    kept, dropped = drop_duplicates([sample.text for sample in reading.samples])
    reading.dropped |= dropped
    if options.pool and options.pool < len(kept):
        kept = sorted(random.Random(options.seed).sample(kept, options.pool))  # noqa: S311
    reading.samples = [reading.samples[i] for i in kept]
    tokenizer = open_tokenizer(request.model.checkpoint.folder, options.trust_remote_code)
    samples = encode_samples(reading, tokenizer, options.sequence_length)
    check_vocabulary(request.model, max(max(sample.tokens) for sample in samples))
    pool, held = hold_back(samples, options.held_back, options.seed)
    template = "chat template" if getattr(tokenizer, "chat_template", None) else "Alpaca prompt"
    facts = {"shapes": reading.shapes, "dropped": reading.dropped, "prompt": template, "pool": len(pool), "held_back": len(held)}
    notes = reading.complaints()
    if reading.first:
        facts["dropped_first"] = reading.first
    if reading.systems_moved:
        facts["system_in_question"] = reading.systems_moved
        notes.append(f"{reading.systems_moved} system turns stand before the question: the chat template takes none")
    return Data(pool, held, facts | ({"notes": notes} if notes else {}))
