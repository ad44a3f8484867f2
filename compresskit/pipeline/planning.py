"""plan: what a recipe would write and need, step by step; nothing is computed but a short probe of this machine's speed.

Bytes and parameters come from the functions by which the stages themselves lay out their files. Memory is a sum of the
large tensors that a stage holds at once (planned_memory.py); time is the probe's seconds for one block and one window,
times the blocks, the windows, and the passes that a stage makes over them. Both are estimates.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

from compresskit.compensate.contract import OUTPUT_WEIGHT_WINDOWS, CompensateMethod
from compresskit.errors import RequestError
from compresskit.memory import peak_memory_bytes
from compresskit.model import Model
from compresskit.pipeline.device import parse_bytes
from compresskit.pipeline.planned import PLANNERS, Planned, planned_source
from compresskit.pipeline.planned_memory import LEFT_BY_FINE_TUNING, block_linears, peak_bytes
from compresskit.pipeline.quantization import HELD_BACK
from compresskit.pipeline.table import aligned
from compresskit.recipe.reading import Recipe
from compresskit.recipe.steps import REFERENCE, Step
from compresskit.recover.contract import RecoverOptions
from compresskit.recover.instructions import read_instructions
from compresskit.stages import BlockMethod, PruneMethod

PROBE_SECONDS = 0.3
PASSES_PRUNE, PASSES_PRUNE_UNIFORM = 2.5, 1.9
"""Measured (docs/prune.md)."""
PASSES_SAMPLING = 2.0
"""Sampling `self` took about as long as two forward passes over as many tokens."""
PASSES_QUANTIZE, PASSES_COMPENSATE, PASSES_TRAINING = 2.7, 4.0, 4.0
"""GPTQ on 2.6; a training pass is a forward, a backward of twice its work, and the rounding of the weights."""
PASSES_MEASURED_GAINS, PASSES_OUTPUT_WEIGHTS = 1.5, 4.0
"""Under a rank budget; a forward, and another with gradients."""
PASSES_FINE_TUNING = 3.0
"""A forward, and a backward of twice its work."""
PASSES_SELECTION = {"paser": 2.0, "kmeans": 1.0}
"""Divergences take a pass of each model, embeddings one of the compressed model, the same one where both are asked for."""
FIXED_SECONDS = {"recover": 25.0}
"""Imports, hashes, files: by stage, where that is more than `OTHER_SECONDS`."""
OTHER_SECONDS = 5.0
BYTES_PER_TOKEN = 4
"""Of English text."""


def plan(recipe: Recipe, probe: bool = True) -> dict[str, Any]:
    """Every step's parameters, bytes, memory and time; nothing is computed but, with `probe`, a moment's work.

    Returns:
        The dictionary that `--json` prints: bytes and seconds, None where they are not known beforehand.

    Raises:
        RequestError: a step cannot work, or disk or memory do not suffice.
    """
    import transformers.modeling_utils  # noqa: F401 - so that the process is as large as a stage's

    models: dict[str, Planned | None] = {}
    sources: dict[str, Planned] = {}
    speed = None
    left_behind = 0
    rows = []
    for step in recipe.steps:
        given = _given(step, models, sources)
        if given is not None and probe and speed is None:
            speed = _probe(given.model, _length(step))
        rows.append(_row(step, given, models, speed, left_behind))
        if step.stage == "recover":
            left_behind = LEFT_BY_FINE_TUNING
    disk = sum(row["disk_bytes"] or 0 for row in rows)
    free = shutil.disk_usage(Path.cwd()).free
    if disk > free:
        raise RequestError(
            f"{recipe.path}: its steps write {disk / 1e9:.2f} GB, {Path.cwd()} has {free / 1e9:.2f} GB free; free some space, "
            "run from another disk, or drop steps of the matrix"
        )
    _check_memory(recipe, rows)
    known = [row["seconds"] for row in rows]
    seconds = sum(known) if rows and None not in known else None
    return {
        "stage": "plan", "recipe": str(recipe.path), "source": recipe.source, "steps": rows,
        "disk_bytes": disk, "disk_free_bytes": free, "seconds": seconds,
        "peak_memory_bytes": max((row["peak_memory_bytes"] or 0 for row in rows), default=0),
    }  # fmt: skip


def _given(step: Step, models: dict[str, Planned | None], sources: dict[str, Planned]) -> Planned | None:
    """The model that the step reads; None where its shapes are not known."""
    found = REFERENCE.fullmatch(step.sources[0])
    if found:
        return models[found[1]]
    if "compeft" in step.title or len(step.sources) > 1:  # a task vector, not a model
        return None
    name = step.sources[0]
    if name not in sources:
        sources[name] = planned_source(name, bool(getattr(step.options, "trust_remote_code", False)))
    return sources[name]


def _row(
    step: Step, given: Planned | None, models: dict[str, Planned | None], speed: float | None, left_behind: int
) -> dict[str, Any]:
    """One line of the plan. `speed`: seconds of a pass of one window; `left_behind`: bytes that earlier steps leave."""
    shard_bytes = parse_bytes(str(getattr(step.options, "max_shard_size", "5GB")))
    row: dict[str, Any] = {"step": step.name, "title": step.title}
    if not step.writes_model:
        sizes = {"bytes": given.bytes(shard_bytes), "parameters": given.parameters} if given else {}
        row |= {"bytes": None, "parameters": None, "disk_bytes": 0} | sizes
    else:
        planner = PLANNERS.get(step.stage)
        made = planner(step, given) if planner and given else None
        models[step.name] = made
        row |= {
            "bytes": made.bytes(shard_bytes) if made else None,
            "parameters": made.parameters if made else None,
            "disk_bytes": made.disk_bytes(shard_bytes) if made else None,
        }
    before = peak_memory_bytes() + left_behind
    row["peak_memory_bytes"] = before + peak_bytes(step, given.model, _windows(step), _length(step)) if given else None
    fixed = FIXED_SECONDS.get(step.stage, OTHER_SECONDS)
    row["seconds"] = round(fixed + _passes(step, given.model) * speed, 1) if given and speed is not None else None
    return row


def _length(step: Step) -> int:
    return int(getattr(step.options, "sequence_length", 512))


def _windows(step: Step) -> int:
    return int(getattr(step.options, "samples", getattr(step.options, "windows", 0)))


def _passes(step: Step, model: Model) -> float:
    """Forward passes of one window through all blocks that the step comes to."""
    windows, method = _windows(step), step.method
    if not step.writes_model:
        return windows * (2.0 if getattr(step.options, "against", None) else 1.0) * (1 + _head_share(model))
    sampling = PASSES_SAMPLING * windows if getattr(step.options, "calibration", "") == "self" else 0.0
    if isinstance(method, PruneMethod):
        return sampling + windows * (PASSES_PRUNE_UNIFORM if method.allocation == "uniform" else PASSES_PRUNE)
    if isinstance(method, BlockMethod):
        return sampling + windows * (PASSES_QUANTIZE + PASSES_TRAINING * float(getattr(method, "epochs", 1)))
    if isinstance(step.options, RecoverOptions):
        return _recover_passes(step, step.options) * (1 + _head_share(model))
    if isinstance(method, CompensateMethod):
        return sampling + _compensate_passes(method, windows, model) + 2 * HELD_BACK * (1 + _head_share(model))
    looked = windows * PASSES_QUANTIZE if getattr(method, "needs_activations", True) else 0.0
    return sampling + looked + 2 * HELD_BACK * (1 + _head_share(model))


def _compensate_passes(method: CompensateMethod, windows: int, model: Model) -> float:
    """The same for the repair itself, the gains of a budget, and the weights of outputs."""
    passes = PASSES_COMPENSATE * windows if method.needs_activations else 0.0
    if method.rank_budget is not None:
        passes += PASSES_MEASURED_GAINS * windows
    if method.weighs_outputs:
        passes += PASSES_OUTPUT_WEIGHTS * min(windows, OUTPUT_WEIGHT_WINDOWS) * (1 + _head_share(model))
    return passes


def _recover_passes(step: Step, options: RecoverOptions) -> float:
    """The same for `recover`, whose samples are shorter than its windows: selection, teacher, training, own texts."""
    samples, length = _instruction_size(options)
    pool = min(options.pool or samples, samples)
    selected = PASSES_SELECTION.get(step.method_name or "", 0.0) * pool * length
    if options.select_only:
        return selected
    chosen = float(getattr(step.method, "budget", 1.0)) * pool
    count, windows = chosen + options.self_samples, chosen * length + options.self_samples
    times = options.steps * options.batch_size / max(1.0, count) if options.steps else options.epochs
    taught = min(1.0, times) * windows if options.loss == "distill" else 0.0
    judged = 2 * options.held_back * pool * length
    return selected + PASSES_SAMPLING * options.self_samples + taught + judged + PASSES_FINE_TUNING * times * windows


def _instruction_size(options: RecoverOptions) -> tuple[int, float]:
    """(samples of the data files, their mean length in windows); a file that is not there yet counts nothing."""
    paths = [path for path in (Path(each).expanduser() for each in options.data) if path.is_file()]
    texts = [sample.text.encode() for sample in read_instructions(paths).samples]
    return len(texts), min(1.0, sum(map(len, texts)) / max(1, len(texts)) / BYTES_PER_TOKEN / options.sequence_length)


def _head_share(model: Model) -> float:
    """The work of the output head over that of all blocks."""
    head = int(model.checkpoint.config["vocab_size"]) * model.hidden_size
    return head / sum(math.prod(model.linear_shape(name)) for name in model.linears)


def _probe(model: Model, length: int) -> float:
    """Seconds of one window of `length` tokens through the linears and the attention of all blocks, as this machine is now."""
    import torch

    shapes = [model.linear_shape(name) for name in block_linears(model, 0)]
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

    from compresskit.evaluate.memory import available_bytes

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
            row["step"], row["title"], _amount(row["parameters"], 1e6, "M"), _amount(row["bytes"], 1e6, "MB"),
            _amount(row["disk_bytes"], 1e6, "MB"), _amount(row["peak_memory_bytes"], 1e9, "GB"), _amount(row["seconds"], 1, "s"),
        ))  # fmt: skip
    total = f"written in all {found['disk_bytes'] / 1e6:.1f} MB of {found['disk_free_bytes'] / 1e9:.1f} GB free"
    when = "" if found["seconds"] is None else f", about {found['seconds'] / 60:.1f} minutes (memory and time are estimates)"
    return aligned(rows) + f"\n{total}{when}"


def _amount(value: float | None, unit: float, name: str) -> str:
    return "?" if value is None else f"{value / unit:.1f} {name}" if value else "-"
