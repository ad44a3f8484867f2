"""Files of a selection: one line per sample with the reason, and the method's facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from compresskit.checkpoint.small_files import first_line, read_json
from compresskit.checkpoint.whole_files import write_whole
from compresskit.errors import CheckpointError
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.method import Choice, Selection

FILE = "selection.jsonl"
STATE = "selection.json"
VECTORS = "vectors.safetensors"
"""File in the workspace with the vectors of the pool and the held-back samples."""


def selection_lines(selection: Selection, pool: Sequence[Sample]) -> str:
    """JSONL in the messages shape, which can be read as instruction data; empty where plain text alone is learned."""
    lines = []
    for choice in selection.choices:
        sample = pool[choice.sample]
        instruction = sample.instruction
        row = {
            "messages": [*instruction.turns, instruction.message],
            **({"tools": instruction.tools} if instruction.tools else {}),
            "source": instruction.source,
            "file": instruction.file,
            "row": instruction.row,
            "tokens": len(sample.tokens),
            "cluster": choice.cluster,
            "jsd": choice.divergence,
            "lost_loss": choice.lost_loss,
            "cost": choice.cost,
            "score": choice.score,
            "reason": choice.reason,
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines)


def write_selection(folder: Path, selection: Selection) -> None:
    """Save a selection for a resumed run."""
    choices = [list(choice) for choice in selection.choices]
    write_whole(folder / STATE, json.dumps({"choices": choices, "facts": selection.facts, "labels": selection.labels}))


def read_selection(folder: Path) -> Selection | None:
    """Read what `write_selection` saved, None if there is nothing; raises CheckpointError if the file is damaged."""
    if not (folder / STATE).is_file():
        return None
    state = read_json(folder / STATE, finite=False)  # a score may be minus infinity
    try:
        choices = [Choice(*choice) for choice in state["choices"]]
        numbers = [choice.sample for choice in choices] + list(state["labels"] or [])
        if not all(type(number) is int and number >= 0 for number in numbers) or not isinstance(state["facts"], dict):
            raise ValueError("numbers of samples and clusters are whole")
        return Selection(choices, state["facts"], state["labels"])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"is no selection ({first_line(error)})"
        raise CheckpointError(f"{folder / STATE}: {reason}; remove it, and run again with --resume") from error
