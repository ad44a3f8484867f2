"""Response losses of the held-back samples before and after fine-tuning, also by cluster of the selection."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from compresskit import distributed
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import write_whole
from compresskit.machine.progress import timed
from compresskit.models.model import Model
from compresskit.recovery.data.held_back import mean_losses
from compresskit.recovery.forward import open_walk
from compresskit.recovery.selection.files import VECTORS, read_selection
from compresskit.recovery.work import Recovery

BEFORE = "before.json"
"""File in the workspace with the source's losses."""


def losses_before(recovery: Recovery) -> dict[str, Any] | None:
    """Losses of the source, reused from an interrupted run if available."""
    file = recovery.request.workspace / BEFORE
    if not distributed.from_first(file.is_file):
        progress = recovery.bars.of("held-back loss")
        progress(0, 1)
        before = held_back_losses(recovery, recovery.request.model)
        distributed.from_first(lambda: write_whole(file, json.dumps({"before": before})))
        progress(1, 1)
    found: dict[str, Any] | None = read_json(file, finite=False).get("before")
    return found


def held_back_losses(recovery: Recovery, model: Model) -> dict[str, Any] | None:
    """Mean response losses of a model on the held-back samples; None if there are none."""
    samples = recovery.held_back
    if not samples:
        return None
    with timed(recovery.seconds, "held_back"):
        return mean_losses(open_walk(model, recovery.where), samples, _clusters(recovery))


def _clusters(recovery: Recovery) -> list[int] | None:
    """For every held-back sample, the cluster of the most similar sample in the pool; None without clusters."""
    selection, file = read_selection(recovery.request.workspace), recovery.request.workspace / VECTORS
    if selection is None or not selection.labels or not file.is_file():
        return None
    vectors: Tensor = load_file(file)["vectors"]
    pool, held = vectors.split([len(recovery.data.pool), len(recovery.data.held_back)])  # type: ignore[no-untyped-call]
    return [selection.labels[i] for i in (held @ pool.T).argmax(dim=1).tolist()]
