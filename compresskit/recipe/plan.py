"""Plan a recipe: size, memory and time of every step, without running it except for a short speed probe.

Every stage's request answers with the functions that its run uses (`outputs`, `passes`, `peak_bytes`); this file sums the
answers. Bytes are exact unless the calibration text determines widths, bits or ranks. Memory and time are estimates.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint import source
from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import RequestError
from compresskit.evaluation.request import EvaluateRequest
from compresskit.evaluation.table import aligned
from compresskit.job import Request
from compresskit.machine.memory import peak_memory_bytes
from compresskit.methods import request_class
from compresskit.models.load import bind, with_adapter
from compresskit.models.model import Model
from compresskit.models.shapes import without_weights
from compresskit.numerics.units import readable_bytes, readable_count
from compresskit.recipe.reading import Recipe
from compresskit.recipe.steps import REFERENCE, Step
from compresskit.task_vectors.merge_request import MergeRequest, base_name
from compresskit.task_vectors.request import MergeOptions

AnyRequest = Request | EvaluateRequest | MergeRequest
PROBE_SECONDS = 0.3
DEFAULT_LENGTH = 512
"""Tokens of the probe's window where the first step has no windows."""


@dataclass(frozen=True)
class Planned:
    """A model that a step reads or writes, before it exists."""

    model: Model
    bytes: int
    """Size of its weight files, an adapter's included."""
    checkpoint_bytes: int
    """Size without an adapter."""


def plan(recipe: Recipe, probe: bool = True) -> dict[str, Any]:
    """Parameters, bytes, memory and time of every step; `probe` times this machine for a moment.

    Returns:
        The dictionary that `--json` prints: bytes and seconds, None where they are not known beforehand.

    Raises:
        RequestError: a step cannot work, or disk or memory do not suffice.
    """
    rows = planned_steps(recipe, probe)
    disk = sum(row["disk_bytes"] or 0 for row in rows)
    scratch = max((row["scratch_bytes"] for row in rows), default=0)
    free = shutil.disk_usage(Path.cwd()).free
    if disk > free:
        raise RequestError(
            f"{recipe.path}: its steps write {disk / 1e9:.2f} GB, {Path.cwd()} has {free / 1e9:.2f} GB free; "
            "free some space, run from another disk, or drop steps of the matrix"
        )
    _check_memory(recipe, rows)
    for row in rows:
        if row["scratch_bytes"] > free - disk:
            left = (free - disk) / 1e9
            raise RequestError(
                f"{recipe.path}: step {row['step']} needs about {row['scratch_bytes'] / 1e9:.1f} GB of scratch files, the disk "
                f"has {left:.1f} GB left; lower samples or sequence_length"
            )
    known = [row["seconds"] for row in rows]
    return {
        "stage": "plan", "recipe": str(recipe.path), "source": recipe.source, "steps": rows,
        "disk_bytes": disk, "scratch_bytes": scratch, "disk_free_bytes": free,
        "seconds": sum(known) if rows and None not in known else None,
        "peak_memory_bytes": max((row["peak_memory_bytes"] or 0 for row in rows), default=0),
    }  # fmt: skip


def planned_steps(recipe: Recipe, probe: bool) -> list[dict[str, Any]]:
    """What `plan` says of each step, whether or not this machine has room for it; raises RequestError if one cannot work."""
    import transformers.modeling_utils  # noqa: F401 - so that the process is as large as a stage's

    models: dict[str, Planned | None] = {}
    sources: dict[str, Planned] = {}
    speed = None
    left_behind = 0
    rows = []
    for step in recipe.steps:
        given, request = _request(step, models, sources)
        if given is not None and probe and speed is None:
            speed = _probe(given.model, int(getattr(step.options, "sequence_length", DEFAULT_LENGTH)))
        row, models[step.name] = _row(step, given, request)
        if request is not None:
            row["peak_memory_bytes"] = peak_memory_bytes() + left_behind + request.peak_bytes()
            row["seconds"] = None if speed is None else round(request.fixed_seconds + request.passes() * speed, 1)
            left_behind = max(left_behind, request.left_bytes)
        rows.append(row)
    return rows


def _request(
    step: Step, models: dict[str, Planned | None], sources: dict[str, Planned]
) -> tuple[Planned | None, AnyRequest | None]:
    """The model that a step reads, None if unknown, and its request, None if sizes depend on the data."""
    kind = request_class(step.stage, step.method_name or "")
    if isinstance(step.options, MergeOptions):
        return _merge_request(step, step.options, models, sources)
    found = REFERENCE.fullmatch(step.sources[0])
    given = models[found[1]] if found else None
    if kind is not None and not found and len(step.sources) == 1:
        given = _known(step.sources[0], step, sources)
    if kind is None or given is None:
        return given, None
    if issubclass(kind, EvaluateRequest):
        return given, EvaluateRequest(given.model, None, step.options)  # type: ignore[arg-type]
    request: Request = kind(step.method, given.model, Path(step.name), step.options)
    request.check()
    return given, request


def _merge_request(
    step: Step, options: MergeOptions, models: dict[str, Planned | None], sources: dict[str, Planned]
) -> tuple[Planned | None, MergeRequest | None]:
    """The base on which a merge scores its candidates, and its request; None if it scores none or its base is not known yet."""
    name = (options.base or step.sources[0]) if options.validation else ""
    found = REFERENCE.fullmatch(name)
    if found and options.base:
        given = models[found[1]]
    else:
        base = base_name(step.sources[0], options) if name and not found else None
        given = _known(base, step, sources) if base else None
    if given is None:
        return None, None
    request = MergeRequest(given.model, len(step.sources), options)
    request.check()
    return given, request


def _known(name: str, step: Step, sources: dict[str, Planned]) -> Planned:
    """The model of this name, opened once."""
    if name not in sources:
        sources[name] = _opened(name, bool(getattr(step.options, "trust_remote_code", False)))
    return sources[name]


def _opened(name: str, trust_remote_code: bool) -> Planned:
    """Open SOURCE; a folder with a configuration but no weights is enough."""
    folder = source.resolve(name)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        model = bind(without_weights(folder, trust_remote_code), trust_remote_code)
        size = sum(spec.bytes for spec in model.checkpoint.tensors.values())
        return Planned(model, size, size)
    model = with_adapter(bind(open_checkpoint(folder), trust_remote_code), None)
    return Planned(model, model.bytes, model.checkpoint.bytes)


def _row(step: Step, given: Planned | None, request: AnyRequest | None) -> tuple[dict[str, Any], Planned | None]:
    """One line of the plan, without memory and time, and the model that the step gives."""
    row: dict[str, Any] = {"step": step.name, "title": step.title, "bytes": None, "parameters": None, "disk_bytes": None}
    row |= {"peak_memory_bytes": None, "seconds": None, "scratch_bytes": getattr(request, "scratch_bytes", 0)}
    if not step.writes_model:
        sizes = {"bytes": given.bytes, "parameters": given.model.parameters} if given else {}
        return row | {"disk_bytes": 0} | sizes, None
    if given is None or not isinstance(request, Request):
        return row, None
    outputs, limit = request.outputs(), request.options.shard_bytes
    written = outputs.bytes(limit)
    checkpoint = sum(shard.size for shard in outputs.model_shards(limit)) if outputs.tensors else given.checkpoint_bytes
    made = Planned(request.result_model(), written if outputs.tensors else checkpoint + written, checkpoint)
    return row | {"bytes": made.bytes, "parameters": made.model.parameters, "disk_bytes": written}, made


def _probe(model: Model, length: int) -> float:
    """Seconds of one window of `length` tokens through the linears and the attention of all blocks, as this machine is now."""
    import torch

    shapes = [model.linear_shape(name) for name in model.block_linears(0)]
    weights = [torch.rand(shape) for shape in shapes]
    inputs = {columns: torch.rand(length, columns) for _, columns in shapes}
    rounds, started = 0, time.monotonic()
    with torch.no_grad():
        while time.monotonic() - started < PROBE_SECONDS or rounds < 2:
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            heads = inputs[model.hidden_size].view(1, 1, length, -1)
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
            rounds += 1
    return (time.monotonic() - started) / rounds * model.block_count


def _check_memory(recipe: Recipe, rows: list[dict[str, Any]]) -> None:
    """RequestError where a step on the CPU needs more memory than is free."""
    import torch

    from compresskit.evaluation.memory import available_bytes

    free = available_bytes(torch.device("cpu"))
    for row in rows:
        needed = row["peak_memory_bytes"]
        if free is not None and needed is not None and needed - peak_memory_bytes() > free:
            raise RequestError(
                f"{recipe.path}: step {row['step']} needs about {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free; "
                "lower samples or sequence_length"
            )


def table(found: dict[str, Any]) -> str:
    """The plan as a table for people."""
    rows = [("step", "what", "parameters", "size", "written", "memory", "time")]
    for row in found["steps"]:
        rows.append((
            row["step"], row["title"], _amount(row["parameters"], readable_count), _amount(row["bytes"], readable_bytes),
            _amount(row["disk_bytes"], readable_bytes), _amount(row["peak_memory_bytes"], readable_bytes),
            _amount(row["seconds"], lambda seconds: f"{seconds:.1f} s"),
        ))  # fmt: skip
    total = f"written in all {readable_bytes(found['disk_bytes'])} of {readable_bytes(found['disk_free_bytes'])} free"
    when = "" if found["seconds"] is None else f", about {found['seconds'] / 60:.1f} minutes (memory and time are estimates)"
    scratch = readable_bytes(found["scratch_bytes"])
    beside = f", {scratch} of scratch files while a step is at work" if found["scratch_bytes"] else ""
    return aligned(rows) + f"\n{total}{beside}{when}"


def _amount(value: float | None, readable: Callable[[float], str]) -> str:
    return "?" if value is None else readable(value) if value else "-"
