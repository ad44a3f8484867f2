"""The compensate stage: check the pair of models without loading torch, then repair, then report what was won."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import calibration, layouts, source
from compresskit.checkpoint import writer as writing
from compresskit.checkpoint.reader import TensorSpec
from compresskit.compensate.contract import OUTPUT_WEIGHT_WINDOWS, Aim, CompensateMethod, CompensateOptions
from compresskit.compensate.plan import adapter_plan, adapter_ranks, dense_dtype, factor_dtype, merged_plan
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.formats import peft
from compresskit.manifest import fingerprint, manifest
from compresskit.memory import peak_memory_bytes
from compresskit.methods import name_of
from compresskit.model import Model
from compresskit.opening import open_model, with_adapter
from compresskit.pairing import Pair, pair, same_weights
from compresskit.pipeline.device import choose_device, parse_bytes
from compresskit.pipeline.quantization import HELD_BACK
from compresskit.pipeline.result import stage_result
from compresskit.progress import ProgressBars, timed
from compresskit.stages import trained_by_block

if TYPE_CHECKING:
    import torch

    from compresskit.compensate.repair import Repair
    from compresskit.walk import Walk

WORSE = 1.05
"""KL after a repair over that before it, above which the repair is called a failure; less is noise of few windows."""
Where = tuple["torch.device", "torch.dtype"]


@dataclass(frozen=True)
class Job:
    """A request that has passed all checks."""

    method: CompensateMethod
    pair: Pair
    base: str
    """SOURCE as adapters name it: a Hub id or an absolute path."""
    names: list[str]
    out: Path
    options: CompensateOptions
    shard_bytes: int

    @property
    def dense(self) -> bool:
        """Whether a dense checkpoint comes out."""
        return self.options.merge or self.method.splits

    @property
    def adapter_folder(self) -> str:
        """Where in OUT the adapter lies, with a slash."""
        return f"{peft.FOLDER}/" if self.method.splits else ""

    @property
    def aim(self) -> Aim:
        """What is repaired, as asked for or by how the source was made."""
        model = self.pair.compressed
        trained = not model.architecture.experts and trained_by_block(model.checkpoint.manifest)
        return self.method.chosen_aim(bool(self.pair.kept) or trained)

    @property
    def text(self) -> tuple[str, int]:
        """(calibration text, windows of it), those that are held back included."""
        spec = self.options.calibration
        if self.method.needs_activations or self.aim != "weight" or self.method.rank_budget or self.method.weighs_outputs:
            return spec, self.options.samples + HELD_BACK
        return "builtin" if spec == "self" else spec, HELD_BACK


def compensate(
    method: CompensateMethod, source_name: str, out: Path, options: CompensateOptions, quiet: bool = True
) -> dict[str, Any]:
    """Repair a compressed checkpoint by an adapter, or into a dense checkpoint.

    Where source and original hold the same weights there is nothing to repair: nothing is written, and "output" is the
    source.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; nothing then appears under `out`.
    """
    started = time.monotonic()
    job = _checked(method, source_name, out, options)
    if not method.splits and same_weights(job.pair):
        compressed = job.pair.compressed
        result = _result(job, {"method": name_of("compensate", method)}, 0, compressed.bytes) | {
            "output": str(compressed.checkpoint.folder),
            "rank_total": 0,
            "note": "source and original hold the same weights: nothing to compensate, nothing was written",
        }
    else:
        with ProgressBars(quiet) as bars:
            result = _compensate(job, bars)
    return result | {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}


def _checked(method: CompensateMethod, source_name: str, out: Path, options: CompensateOptions) -> Job:
    """What can be refused before any work."""
    shard_bytes = parse_bytes(options.max_shard_size)
    folder = source.resolve(source_name)
    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
        raise RequestError(f"{folder}: is an adapter; pass the checkpoint that it belongs to")
    compressed = with_adapter(open_model(folder, options.trust_remote_code), None)
    original = with_adapter(open_model(source.resolve(options.original), options.trust_remote_code), None)
    found = pair(compressed, original)
    names = [name for name in compressed.linears if not any(part in name for part in method.ignore)]
    base = source_name if source.is_hub_id(source_name) else str(folder.resolve())
    job = Job(method, found, base, names, out, options, shard_bytes)
    _check_method(job)
    calibration.check(*job.text, options.sequence_length)
    weights = sum(math.prod(compressed.linear_shape(name)) for name in names)
    writing.check_out(out, folder, 4 * weights if job.dense else 0, options.overwrite)
    return job


def _check_method(job: Job) -> None:
    method, compressed = job.method, job.pair.compressed
    if not job.names:
        raise RequestError(f"--ignore {' '.join(method.ignore)}: leaves nothing to repair; ignore less")
    if method.splits and job.options.merge:
        raise RequestError("--merge: would put back what this method takes out; drop it")
    if compressed.architecture.experts and (method.splits or not job.options.merge):
        raise UnsupportedArchitecture(f"{compressed.family}: adapters cannot reach its experts; pass --merge")
    if compressed.architecture.transposed and (method.splits or not job.options.merge):
        raise UnsupportedArchitecture(f"{compressed.family}: its linears are stored transposed; pass --merge")
    if compressed.architecture.experts and job.aim != "weight":
        raise UnsupportedArchitecture(
            f"{compressed.family}: its experts see other tokens than the original's; only --aim weight of unpruned ones is built"
        )
    if compressed.adapter is not None and method.adapter_bits == 8 and not job.dense:
        raise RequestError(
            f"{compressed.adapter.folder}: this 16-bit adapter joins the new one; pass --adapter-bits 16, or --merge"
        )
    method.check_ranks(compressed, job.names)


def _compensate(job: Job, bars: ProgressBars) -> dict[str, Any]:
    """The work itself, once everything has been checked."""
    from compresskit.compensate.repair import repair_blocks

    compressed, options = job.pair.compressed, job.options
    where = choose_device(options.device, options.dtype, compressed)
    spec, windows = job.text
    found = calibration.calibrate(
        spec, job.pair.original, windows, options.sequence_length, options.seed, *where,
        options.trust_remote_code, lambda done, total: bars("sampling text", done, total),
    )  # fmt: skip
    text = {"calibration_text": found.description, "calibration_digest": found.digest}
    settings = _settings(job, where)
    inputs = (compressed.checkpoint.hashes, job.pair.original.checkpoint.hashes)
    key = fingerprint("compensate", settings, job.shard_bytes, *inputs, text["calibration_digest"])
    progress = writing.read_progress(job.out, key) if options.resume else None
    tokens, held_back = found.tokens[:-HELD_BACK], found.tokens[-HELD_BACK:]
    request = _request(job, tokens, where, progress, bars)
    plan, extra = _plans(job, request)
    with writing.Writer(job.out, plan, job.shard_bytes, key, extra) as writer:
        finished: dict[str, Model] = {}
        if progress:
            writer.resume(progress)
            finished |= dict.fromkeys(writer.done, _written(job, request, writer))
        else:
            config, files = (_configuration(job), layouts.own_files(compressed)) if job.dense else (None, {})
            writer.start(config, compressed.checkpoint.folder, files)
            writer.facts |= {"blocks": [], "ranks": request.ranks}
        repair_blocks(request, _walks(job, tokens, where, finished), writer, bars)
        writer.copy_missing(compressed.checkpoint)
        facts = _scores(job, _written(job, request, writer), held_back, where) | {"rank_total": sum(request.ranks.values())}
        writer.commit(manifest("compensate", settings, compressed.checkpoint, writer.hashes(), writer.facts | facts | text))
    written = sum(shard.size for shard in writer.shards)
    added = 0 if options.merge else sum(rank * sum(compressed.linear_shape(name)) for name, rank in request.ranks.items())
    result = _result(job, settings, added, written if job.dense else compressed.checkpoint.bytes + written)
    seconds = {what: round(value, 2) for what, value in request.seconds.items()}
    return result | facts | {"ranks": request.ranks, "time_shares": seconds}


def _plans(job: Job, request: Repair) -> tuple[list[TensorSpec], dict[str, list[TensorSpec]]]:
    """The tensors of the dense checkpoint, and of the adapter's file."""
    compressed = job.pair.compressed
    plan = merged_plan(compressed, dense_dtype(compressed)) if job.dense else []
    if job.options.merge:
        return plan, {}
    ranks = request.ranks if job.method.splits else adapter_ranks(compressed, request.ranks)
    dtype = factor_dtype(compressed, job.method.adapter_bits)
    return plan, {job.adapter_folder + peft.WEIGHTS: adapter_plan(compressed, ranks, dtype)}


def _request(job: Job, tokens: torch.Tensor, where: Where, progress: dict[str, Any] | None, bars: ProgressBars) -> Repair:
    """The walk's request, with the rank of every linear: asked for, dealt, or what an interrupted run had dealt."""
    from compresskit.checkpoint.dtypes import TORCH_DTYPES
    from compresskit.compensate.ranks import deal_ranks
    from compresskit.compensate.repair import Repair, measured_gains

    method, compressed = job.method, job.pair.compressed
    names = compressed.linears if job.dense else job.names
    merged = TORCH_DTYPES[dense_dtype(compressed)] if job.dense else None
    factors = TORCH_DTYPES[factor_dtype(compressed, method.adapter_bits)]
    request = Repair(method, job.pair, names, job.aim, dtype=factors, merged=merged)
    if method.weighs_outputs:
        with timed(request.seconds, "output_weights"):
            request.weights = _output_weights(job, tokens, where, bars)
    if progress:
        request.ranks = progress["facts"]["ranks"]
    elif method.rank_budget is None:
        request.ranks = dict.fromkeys(job.names, method.uniform_rank(compressed))
    else:
        found = measured_gains(replace(request, names=job.names), _walks(job, tokens, where, {}), bars)
        costs = {name: sum(compressed.linear_shape(name)) for name in job.names}
        request.ranks = deal_ranks(found, costs, method.budget(compressed, job.names), method.round_rank)
    return request


def _output_weights(job: Job, tokens: torch.Tensor, where: Where, bars: ProgressBars) -> dict[str, torch.Tensor]:
    """How much the original's predictions mind errors of the repaired linears' outputs, from some of the windows."""
    from compresskit.compensate.influence import LEAST, output_weights
    from compresskit.walk import Walk

    options, both = job.options, job.pair
    walk = Walk(both.original, tokens[:OUTPUT_WEIGHT_WINDOWS], *where, options.trust_remote_code, micro_batch=1)
    with tempfile.TemporaryDirectory(dir=job.out.absolute().parent, prefix=f".{job.out.name}.scratch-") as scratch:
        found = output_weights(walk, job.names, Path(scratch), bars, options.seed)
    return {name: both.cut_outputs(name, values).clamp_min(LEAST) for name, values in found.items()}


def _walks(job: Job, tokens: torch.Tensor, where: Where, finished: dict[str, Model]) -> tuple[Walk, Walk | None]:
    """Of the compressed model, finished blocks from what was written, and of the original where its outputs are aimed at."""
    from compresskit.walk import Walk, micro_batch_size

    options, both = job.options, job.pair
    size = micro_batch_size(both.original, tokens.shape[1])
    walk = Walk(both.compressed, tokens, *where, options.trust_remote_code, lambda i: finished.get(f"block {i}"), size)
    if job.aim == "weight":
        return walk, None
    return walk, Walk(both.original, tokens, *where, options.trust_remote_code, micro_batch=size)


def _written(job: Job, request: Repair, writer: writing.Writer) -> Model:
    """The source with what is in the partial folder."""
    if job.options.merge:
        return open_model(writer.partial)
    writer.write_text(job.adapter_folder + peft.CONFIG, _adapter_config(job, request, writer))
    if job.method.splits:
        return with_adapter(open_model(writer.partial), None)
    return with_adapter(replace(job.pair.compressed, adapter=None), writer.partial)


def _adapter_config(job: Job, request: Repair, writer: writing.Writer) -> str:
    """adapter_config.json, with the scales of the blocks that are finished."""
    block_name = job.pair.compressed.block_name
    scales = peft.scales_by_name({block_name(i): facts["scale"] for i, facts in enumerate(writer.facts["blocks"])})
    if job.method.splits:
        return peft.config_text(str(job.out.resolve()), {name: rank for name, rank in request.ranks.items() if rank}, scales)
    return peft.config_text(job.base, adapter_ranks(job.pair.compressed, request.ranks), scales)


def _configuration(job: Job) -> dict[str, Any]:
    """config.json of the merged checkpoint."""
    config = dict(job.pair.compressed.checkpoint.config)
    config.pop("quantization_config", None)
    return config


def _settings(job: Job, where: Where) -> dict[str, Any]:
    """Everything that decides the weights, besides the models and the text."""
    shared = job.options.model_dump(include={"calibration", "samples", "sequence_length", "seed", "merge"})
    used = {"dtype": str(where[1]).removeprefix("torch."), "device": where[0].type, "aim": job.aim}
    return {"method": name_of("compensate", job.method), **job.method.model_dump(), **shared, **used}


def _scores(job: Job, repaired: Model, windows: torch.Tensor, where: Where) -> dict[str, Any]:
    """KL to the original on the windows that were held back, before and after, and what is wrong with it."""
    from compresskit.evaluate.language_modelling import score
    from compresskit.evaluate.scores import collapse_warning

    both = job.pair
    before, after = (score(model, windows, *where, reference=both.original) for model in (both.compressed, repaired))
    warning = collapse_warning(after)
    if warning is None and (after.kl or 0.0) > WORSE * (before.kl or 0.0):
        warning = f"{job.out}: worse than its source, KL {before.kl:.4g} -> {after.kl:.4g} on held-back text; keep the source"
    return {"kl_before": before.kl, "kl_after": after.kl, "warning": warning}


def _result(job: Job, settings: dict[str, Any], added: int, bytes_after: int) -> dict[str, Any]:
    compressed = job.pair.compressed
    before, after = (compressed.parameters, compressed.bytes), (compressed.parameters + added, bytes_after)
    found = stage_result("compensate", settings, job.out, compressed.checkpoint.folder, before, after)
    return found | {"original": str(job.pair.original.checkpoint.folder)}
