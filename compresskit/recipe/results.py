"""What a run says of itself and its steps, as OUT/report.json and OUT/run.json hold it. No torch.

Both files, and the reports and manifests of the steps, may be a stranger's. Whatever verdict.py and report/ show of them is
checked here when it is read; what they do not show may be anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.checkpoint.kinds import (
    LIST,
    NUMBER,
    NUMBERS,
    OBJECT,
    TEXT,
    TEXTS,
    TRUE_OR_FALSE,
    WHOLE_NUMBER,
    Kind,
    Stated,
    is_number,
)
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError


def _is_score(value: object) -> bool:
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    return all(map(is_number, numbers))


def _is_answer(value: object) -> bool:
    if not isinstance(value, dict) or not all(isinstance(value.get(key), str) for key in ("prompt", "after")):
        return False
    return isinstance(value.get("before"), str | None)


ANSWERS = Kind(
    "a list of objects with the texts 'prompt', 'before' and 'after'",
    lambda value: isinstance(value, list) and all(map(_is_answer, value)),
)
TASKS = Kind(
    "a score, or scores by name, for every task",
    lambda value: isinstance(value, dict) and all(map(_is_score, value.values())),
)
RUN: dict[str, Kind] = {
    "recipe": TEXT.always, "output": TEXT.always, "source": TEXT.always, "steps": OBJECT.always, "gates": LIST.always,
    "passed": TRUE_OR_FALSE.always,
}  # fmt: skip
"""Of a run."""
STEP: dict[str, Kind] = {
    "stage": TEXT.always, "method": TEXT, "source": TEXTS, "adapter": TEXT, "output": TEXT, "bytes": NUMBER,
    "bytes_after": NUMBER, "seconds": NUMBER, "peak_memory_bytes": NUMBER, "perplexity": NUMBER, "perplexity_ratio": NUMBER,
    **dict.fromkeys(("kl_held_back", "kl_before", "kl_after"), NUMBER),
}  # fmt: skip
"""Of every step."""
EVALUATION: dict[str, Kind] = {
    "source": TEXT, "text": TEXT.always, "tokens": WHOLE_NUMBER.always,
    **dict.fromkeys(("bytes", "parameters", "perplexity"), NUMBER.always),
    **dict.fromkeys(("reference_bytes", "reference_parameters", "reference_perplexity"), NUMBER),
    **dict.fromkeys(("size_ratio_16bit", "bits_per_weight", "kl", "top1_agreement"), NUMBER),
    "speed": NUMBERS, "generations": ANSWERS, "tasks": TASKS, "warning": TEXT, "against": TEXT,
}  # fmt: skip
"""Of a step that measures, which reads one model."""
GATE: dict[str, Kind] = {
    **dict.fromkeys(("step", "metric", "operator"), TEXT.always),
    "limit": NUMBER.always, "value": NUMBER, "passed": TRUE_OR_FALSE.always, "missed_by": NUMBER,
}  # fmt: skip


def check_run(found: Mapping[str, Any], file: Stated) -> None:
    """Check the result of a whole run; raises CheckpointError, which names the file and the value."""
    file.check(found, RUN)
    for name, step in found["steps"].items():
        if step is not None:
            check_step(step, name, file)
    for gate in found["gates"]:
        if not isinstance(gate, dict):
            raise CheckpointError(f"{file.path}: states the gate {shown(gate)}, expected an object; {file.remedy}")
        file._replace(part=f"of the gate {shown(gate)}").check(gate, GATE)


def check_step(step: object, name: str, file: Stated) -> None:
    """Check the result of a step; raises CheckpointError, which names the file and the value."""
    if not isinstance(step, dict):
        raise CheckpointError(f"{file.path}: says of {name} {shown(step)}, expected a step's report; {file.remedy}")
    file = file._replace(part=f"of step {shown(name)}")
    file.check(step, STEP)
    if step["stage"] == "evaluate":
        file.check(step, EVALUATION)
