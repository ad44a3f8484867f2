"""The prune stage: check everything that can be checked without loading torch, then do the work, then report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import calibration, layouts, source
from compresskit.checkpoint import writer as writing
from compresskit.errors import RequestError
from compresskit.manifest import fingerprint, manifest
from compresskit.memory import peak_memory_bytes
from compresskit.methods import name_of
from compresskit.model import Model
from compresskit.opening import open_model
from compresskit.pipeline.device import choose_device, parse_bytes
from compresskit.pipeline.result import stage_result
from compresskit.progress import ProgressBars
from compresskit.stages import Options, PruneMethod

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Job:
    """A request that has passed all checks."""

    method: PruneMethod
    model: Model
    out: Path
    options: Options
    shard_bytes: int
    needs_text: bool
    """Whether anything of the work looks at calibration text."""


def _check_prune(method: PruneMethod, model: Model, needs_text: bool, options: Options) -> None:
    """What only pruning asks of a source; everything here is known before any work."""
    folder = model.checkpoint.folder
    if model.quantized:
        raise RequestError(f"{folder}: is quantized already; prune the dense checkpoint, then quantize the result")
    others = {s.dtype for s in model.checkpoint.tensors.values()} - {"F64", "F32", "F16", "BF16"}
    if others & {"F8_E4M3", "F8_E5M2", "I8", "U8"}:
        raise RequestError(f"{folder}: holds {', '.join(sorted(others))} tensors; prune a 16- or 32-bit checkpoint")
    widest = max(group.width for index in range(model.block_count) for group in model.ffn_groups(index))
    if method.round_to > widest:
        raise RequestError(f"--round-to {method.round_to}: the widest FFN has {widest} channels; choose less")
    if method.allocation != "uniform" and method.layout == "ragged" and method.sparsity > 0:
        layouts.check_ragged(model)
    if needs_text:
        calibration.check(options.calibration, options.samples, options.sequence_length)


def prune(method: PruneMethod, source_name: str, out: Path, options: Options, quiet: bool = True) -> dict[str, Any]:
    """Prune a checkpoint folder into another one.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; nothing then appears under `out`.
    """
    started = time.monotonic()
    shard_bytes = parse_bytes(options.max_shard_size)
    folder = source.resolve(source_name)
    model = open_model(folder, options.trust_remote_code)
    needs_text = method.sparsity > 0 and (method.refit or method.needs_activations or method.allocation != "uniform")
    _check_prune(method, model, needs_text, options)
    writing.check_out(out, folder, _estimated_bytes(method, model), options.overwrite)
    with ProgressBars(quiet) as bars:
        result = _prune(Job(method, model, out, options, shard_bytes, needs_text), bars)
    return result | {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}


def _estimated_bytes(method: PruneMethod, model: Model) -> int:
    """Size of the result when every block keeps its share; the whole source when the layout pads."""
    total = sum(spec.bytes for spec in model.checkpoint.tensors.values())
    if method.layout == "padded":
        return total
    ffn_bytes = 0
    for index in range(model.block_count):
        for group in model.ffn_groups(index):
            for ffn in group.members:
                names = (*ffn.in_projections, ffn.out_projection)
                ffn_bytes += sum(model.checkpoint.spec(model.stored_name(f"{name}.weight")).bytes for name in names)
    return int(total - method.sparsity * ffn_bytes)


def _prune(job: Job, bars: ProgressBars) -> dict[str, Any]:
    """The work itself, once everything has been checked."""
    from compresskit.prune.allotment import Allotment, allot
    from compresskit.prune.structured import Request, output_plan, prune_blocks
    from compresskit.walk import Walk

    method, model, options = job.method, job.model, job.options
    device, dtype = choose_device(options.device, options.dtype, model)
    tokens, text = _calibration(job, device, dtype, bars)
    settings = _settings(job, device, dtype)
    key = fingerprint("prune", settings, job.shard_bytes, model.checkpoint.hashes, text["calibration_digest"])
    progress = writing.read_progress(job.out, key) if options.resume else None

    finished: dict[str, Model] = {}
    walk = Walk(model, tokens, device, dtype, options.trust_remote_code, lambda i: finished.get(f"block {i}"))
    if progress:
        allotted = Allotment(progress["facts"]["widths"], progress["facts"]["importances"])
    else:
        allotted = allot(method, walk, bars)
    bias = method.adds_bias and job.needs_text and can_store_bias(model)
    stored = layouts.stored_widths(model, allotted.widths, method.layout)
    plan = output_plan(model, stored, bias)
    with writing.Writer(job.out, plan, job.shard_bytes, key) as writer:
        if progress:
            writer.resume(progress)
            finished |= dict.fromkeys(writer.done, open_model(writer.partial))
        else:
            _start(job, writer, stored, bias)
            writer.facts |= {"widths": allotted.widths, "importances": allotted.importances, "blocks": []}
        prune_blocks(method, walk, Request(allotted.widths, stored, bias), writer, bars)
        summary = {
            "sparsity_achieved": sparsity(model, allotted.widths),
            "layout": "uniform" if layouts.is_uniform(model, stored) else method.layout,
            "output_bias": bias,
        }
        made = manifest("prune", settings, model.checkpoint, writer.hashes(), writer.facts | summary | text)
        writer.commit(made)
    return _result(job, writer, settings) | {"widths": allotted.widths} | summary


def _calibration(
    job: Job, device: torch.device, dtype: torch.dtype, bars: ProgressBars
) -> tuple[torch.Tensor, dict[str, str | None]]:
    """(tokens (samples, sequence_length), what text they are); no samples where the method needs none."""
    import torch

    options = job.options
    if not job.needs_text:
        nothing = torch.zeros(0, options.sequence_length, dtype=torch.int64)
        return nothing, {"calibration_text": None, "calibration_digest": None}
    found = calibration.calibrate(
        options.calibration, job.model, options.samples, options.sequence_length, options.seed, device, dtype,
        options.trust_remote_code, lambda done, total: bars("sampling text", done, total),
    )  # fmt: skip
    return found.tokens, {"calibration_text": found.description, "calibration_digest": found.digest}


def _settings(job: Job, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the weights, besides the source and the text."""
    shared = job.options.model_dump(include={"calibration", "samples", "sequence_length", "seed"})
    used = {"dtype": str(dtype).removeprefix("torch."), "device": device.type}
    return {"method": name_of("prune", job.method), **job.method.model_dump(), **shared, **used}


def _start(job: Job, writer: writing.Writer, stored: layouts.Widths, bias: bool) -> None:
    """Make the partial folder, now that the size of the result is known."""
    folder = job.model.checkpoint.folder
    writing.check_out(job.out, folder, sum(spec.bytes for spec in writer.specs.values()), job.options.overwrite)
    config, generated = layouts.configuration(job.model, stored)
    if bias and job.model.architecture.ffn_bias_key:
        config[job.model.architecture.ffn_bias_key] = True
    writer.start(config, folder, generated)


def _result(job: Job, writer: writing.Writer, settings: dict[str, Any]) -> dict[str, Any]:
    checkpoint = job.model.checkpoint
    written = sum(spec.elements for spec in writer.specs.values()), sum(shard.size for shard in writer.shards)
    return stage_result("prune", settings, job.out, checkpoint.folder, (checkpoint.parameters, checkpoint.bytes), written)


def can_store_bias(model: Model) -> bool:
    """Whether the stock architecture has an FFN output bias: stored already, or switched on by a configuration key."""
    return model.has(f"{model.ffn_groups(0)[0].members[0].out_projection}.bias") or bool(model.architecture.ffn_bias_key)


def sparsity(model: Model, widths: layouts.Widths) -> float:
    """Share of all FFN channels that these widths remove."""
    pairs = [
        (group.width * len(group.members), width * len(group.members))
        for index, block in enumerate(widths)
        for group, width in zip(model.ffn_groups(index), block, strict=True)
    ]
    return 1 - sum(kept for _, kept in pairs) / sum(full for full, _ in pairs)
