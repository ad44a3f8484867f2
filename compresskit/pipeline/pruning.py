"""The prune stage: check everything that can be checked without loading torch, then do the work, then report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from compresskit import calibration, layouts, source
from compresskit.architectures import Model, open_model
from compresskit.checkpoint import writer as writing
from compresskit.errors import RequestError
from compresskit.manifest import fingerprint, manifest
from compresskit.pipeline.device import choose_device, parse_bytes
from compresskit.progress import ProgressBars, peak_memory_bytes
from compresskit.stages import Options, PruneMethod


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
    """Prune a checkpoint folder into another one; returns what `--json` prints.

    Raises the errors of errors.py; nothing appears under `out` unless the whole stage succeeds.
    """
    started = time.monotonic()
    shard_bytes = parse_bytes(options.max_shard_size)
    folder = source.resolve(source_name)
    model = open_model(folder, options.trust_remote_code)
    needs_text = method.sparsity > 0 and (method.refit or method.needs_activations or method.allocation != "uniform")
    _check_prune(method, model, needs_text, options)
    writing.check_out(out, folder, _estimated_bytes(method, model), options.overwrite)
    with ProgressBars(quiet) as bars:
        result = _prune(method, model, out, (options, shard_bytes, needs_text), bars)
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


def _prune(
    method: PruneMethod, model: Model, out: Path, settings: tuple[Options, int, bool], bars: ProgressBars
) -> dict[str, Any]:
    """The work itself, once everything has been checked."""
    import torch

    from compresskit.prune.allotment import Allotment, allot
    from compresskit.prune.structured import Request, output_plan, prune_blocks
    from compresskit.walk import Walk

    options, shard_bytes, needs_text = settings
    device, dtype = choose_device(options.device, options.dtype, model)
    text = None
    tokens = torch.zeros(0, options.sequence_length, dtype=torch.int64)
    if needs_text:
        text = calibration.calibrate(
            options.calibration, model, options.samples, options.sequence_length, options.seed, device, dtype,
            options.trust_remote_code, lambda done, total: bars("sampling text", done, total),
        )  # fmt: skip
        tokens = text.tokens
    chosen = method.model_dump() | options.model_dump(include={"calibration", "samples", "sequence_length", "seed"})
    chosen |= {"dtype": str(dtype).removeprefix("torch."), "device": device.type}
    key = fingerprint("prune", type(method).__name__, chosen, shard_bytes, model.checkpoint.hashes, text and text.digest)
    progress = writing.read_progress(out, key) if options.resume else None

    finished: dict[str, Model] = {}
    walk = Walk(model, tokens, device, dtype, options.trust_remote_code, lambda i: finished.get(f"block {i}"))
    if progress:
        allotted = Allotment(progress["facts"]["widths"], progress["facts"]["importances"])
    else:
        allotted = allot(method, walk, bars)
    bias = method.adds_bias and text is not None and can_store_bias(model)
    stored = layouts.stored_widths(model, allotted.widths, method.layout)
    plan = output_plan(model, stored, bias)
    with writing.Writer(out, plan, shard_bytes, key) as writer:
        if progress:
            writer.resume(progress)
            partial = open_model(writer.partial)
            finished |= dict.fromkeys(writer.done, partial)
        else:
            writing.check_out(out, model.checkpoint.folder, sum(spec.bytes for spec in plan), options.overwrite)
            config, generated = layouts.configuration(model, stored)
            if bias and model.architecture.ffn_bias_key:
                config[model.architecture.ffn_bias_key] = True
            writer.start(config, model.checkpoint.folder, generated)
            writer.facts |= {"widths": allotted.widths, "importances": allotted.importances, "blocks": []}
        prune_blocks(method, walk, Request(allotted.widths, stored, bias), writer, bars)
        facts = writer.facts | {
            "layout": "uniform" if layouts.is_uniform(model, stored) else method.layout,
            "sparsity_achieved": sparsity(model, allotted.widths),
            "output_bias": bias,
            "calibration_text": text.description if text else None,
            "calibration_digest": text.digest if text else None,
        }
        writer.commit(manifest("prune", _name(method), chosen, model.checkpoint, writer.hashes(), facts))
    return {
        "stage": "prune",
        "method": _name(method),
        "output": str(out),
        "source": str(model.checkpoint.folder),
        "parameters_before": model.checkpoint.parameters,
        "parameters_after": sum(spec.elements for spec in plan),
        "bytes_before": model.checkpoint.bytes,
        "bytes_after": sum((out / shard.name).stat().st_size for shard in writer.shards),
        "settings": chosen,
        "sparsity_achieved": facts["sparsity_achieved"],
        "widths": allotted.widths,
        "layout": facts["layout"],
        "output_bias": bias,
    }


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


def _name(method: PruneMethod) -> str:
    from compresskit.methods import METHODS

    module = type(method).__module__
    return next(name for name, entry in METHODS["prune"].items() if entry.target.startswith(module + ":"))
