"""Every model type of transformers through every stage: a table of what works, what is refused and why.

    PYTHONPATH=tests python benchmarks/family_table.py [--types a,b] [--work FOLDER] [--markdown FILE]

Tiny random checkpoints (tests/families.py) go through the stages (tests/family_stages.py). Each result is opened by stock
transformers: sparsity 0 keeps every byte, 8-bit codes are close, pruned and 4-bit logits are those of our own walk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import families
from family_stages import STAGES, WORKS, cells
from transformers import logging

from compresskit.models.architectures import ARCHITECTURES

TEXT = "the quick brown fox jumps over a lazy dog while seven quiet engineers measure how small a model can be "


def main() -> int:
    """Run all types, or those that are named; returns 1 if a cell is wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default="")
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    types = arguments.types.split(",") if arguments.types else [*families.TINY, *families.HELD_OUT]
    stages = tuple(arguments.stages.split(","))
    found: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        text = root / "text.txt"
        text.write_text(TEXT * 60)
        for model_type in types:
            started = time.monotonic()
            source = families.build(model_type, root / model_type)
            found[model_type] = cells(model_type, source, root / "work", text, stages)
            shutil.rmtree(source)
            other = {stage: cell for stage, cell in found[model_type].items() if cell != WORKS}
            print(json.dumps({"type": model_type, "seconds": round(time.monotonic() - started, 1), "not": other}), flush=True)
    counts = {stage: Counter(row[stage].partition(":")[0] for row in found.values()) for stage in stages}
    print(json.dumps({stage: dict(count) for stage, count in counts.items()}))
    if arguments.markdown:
        arguments.markdown.write_text(markdown(found, stages))
    return int(any(cell.startswith(("WRONG", "CRASH")) for row in found.values() for cell in row.values()))


def markdown(found: dict[str, dict[str, str]], stages: tuple[str, ...]) -> str:
    """The table, and the reasons of refusals below it."""
    lines = [f"| family | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for model_type, row in found.items():
        marks = []
        for stage in stages:
            kind, _, reason = row[stage].partition(": ")
            marks.append({"works": "yes", "refused": "refused"}.get(kind, kind))
            if reason:
                text = reason.split(": ", 1)[-1] if reason.startswith(("/", model_type)) else reason
                reasons.setdefault(text, []).append(f"{model_type} ({stage})")
        known = "" if model_type not in ARCHITECTURES else " *"
        held_out = " †" if model_type in families.HELD_OUT else ""
        lines.append(f"| {model_type}{known}{held_out} | {' | '.join(marks)} |")
    lines += [
        "",
        "\\* in the table of known structures; † held out of the derivation's development.",
        "",
        "Refused, and why:",
        "",
    ]
    lines += [f"- {reason}: {', '.join(places)}" for reason, places in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
