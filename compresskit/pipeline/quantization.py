"""The quantize stage: check everything that can be checked without loading torch, then do the work, then report.

It ends with a figure that no collapse survives: the KL divergence from the original on calibration windows that were
held back.
"""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import calibration, layouts, source
from compresskit.architectures import HEAD
from compresskit.checkpoint import writer as writing
from compresskit.errors import RequestError
from compresskit.formats import peft
from compresskit.manifest import fingerprint, manifest
from compresskit.memory import peak_memory_bytes
from compresskit.methods import name_of
from compresskit.model import Model
from compresskit.opening import open_model, with_adapter
from compresskit.pipeline.device import choose_device, parse_bytes
from compresskit.pipeline.result import stage_result
from compresskit.progress import ProgressBars
from compresskit.stages import BlockMethod, GridMethod, Options, QuantizeMethod, quantised_linears

if TYPE_CHECKING:
    import torch

    from compresskit.checkpoint.reader import TensorSpec
    from compresskit.evaluate.scores import Scores
    from compresskit.scheme import Scheme

HELD_BACK = 4
"""Calibration windows that the method never sees, for the closing figure."""
BITS_PER_BYTE = 8
MIXED_WINDOWS = 4
"""Windows on which mixed precision measures what each block loses; of a method that needs no text, those held back."""
FISHER_WINDOWS = 16
"""Windows over which the squared gradients are averaged."""


@dataclass(frozen=True)
class Job:
    """A request that has passed all checks."""

    method: QuantizeMethod
    model: Model
    schemes: dict[str, Scheme | None]
    """The grid of every linear that is quantised, by plain name."""
    out: Path
    options: Options
    shard_bytes: int

    @property
    def text(self) -> tuple[str, int]:
        """(calibration text, windows of it): those held back, and the samples of a method that looks at any.

        A method that needs no text is not made to wait for text sampled from the model.
        """
        spec = self.options.calibration
        if self.method.needs_activations:
            return spec, self.options.samples + HELD_BACK
        return "builtin" if spec == "self" else spec, HELD_BACK

    @property
    def rank(self) -> int:
        """Of the adapter that is trained beside the weights, 0 for none."""
        return self.method.adapter_rank(self.model) if isinstance(self.method, BlockMethod) else 0

    @property
    def plan(self) -> list[TensorSpec]:
        """The tensors of the checkpoint."""
        from compresskit.quantize.plan import output_plan

        return output_plan(self.method, self.model, self.schemes, self.scale_dtype)

    @property
    def adapter_plan(self) -> list[TensorSpec]:
        """The tensors of the adapter."""
        if not self.rank:
            return []
        shapes = {name: self.model.linear_shape(name) for name in self.schemes}
        return [spec for name, shape in shapes.items() for spec in peft.plan(name, shape, self.rank, self.factor_dtype)]

    @property
    def scale_dtype(self) -> str:
        """Of the stored scales, in safetensors' spelling: bfloat16 for a bfloat16 checkpoint, else float16, the finer one."""
        return "BF16" if weight_dtype(self.model) == "BF16" else "F16"

    @property
    def factor_dtype(self) -> str:
        """Of the adapter's factors, likewise."""
        small = isinstance(self.method, BlockMethod) and self.method.has_small_factors
        return peft.factor_dtype(8 if small else 16, self.scale_dtype)


def weight_dtype(model: Model) -> str:
    """The dtype in which the blocks' linears are stored, in safetensors' spelling."""
    return model.checkpoint.spec(model.stored_name(f"{model.linears[0]}.weight")).dtype


def quantize(method: QuantizeMethod, source_name: str, out: Path, options: Options, quiet: bool = True) -> dict[str, Any]:
    """Quantise a checkpoint folder into another one.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; nothing then appears under `out`.
    """
    started = time.monotonic()
    shard_bytes = parse_bytes(options.max_shard_size)
    folder = source.resolve(source_name)
    model = open_model(folder, options.trust_remote_code)
    job = _checked(method, model, out, options, shard_bytes)
    with ProgressBars(quiet) as bars:
        result = _quantize(job, bars)
    return result | {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}


def _checked(method: QuantizeMethod, model: Model, out: Path, options: Options, shard_bytes: int) -> Job:
    """What can be refused before any work."""
    folder = model.checkpoint.folder
    if model.quantized:
        raise RequestError(f"{folder}: is quantized already; quantize the dense checkpoint it was made from")
    if weight_dtype(model) not in ("F32", "F16", "BF16"):
        raise RequestError(f"{folder}: holds {weight_dtype(model)} weights; quantize a 16- or 32-bit checkpoint")
    method.check(model)
    schemes: dict[str, Scheme | None] = dict.fromkeys(quantised_linears(model, method.ignore), method.scheme(model))
    if not schemes:
        raise RequestError(f"--ignore {' '.join(method.ignore)}: leaves nothing to quantize; ignore less")
    job = Job(method, model, schemes, out, options, shard_bytes)
    calibration.check(*job.text, options.sequence_length)
    writing.check_out(out, folder, sum(spec.bytes for spec in (*job.plan, *job.adapter_plan)), options.overwrite)
    return job


def _quantize(job: Job, bars: ProgressBars) -> dict[str, Any]:
    """The work itself, once everything has been checked."""
    model, options = job.model, job.options
    device, dtype = choose_device(options.device, options.dtype, model)
    spec, windows = job.text
    found = calibration.calibrate(
        spec, model, windows, options.sequence_length, options.seed, device, dtype,
        options.trust_remote_code, lambda done, total: bars("sampling text", done, total),
    )  # fmt: skip
    text = {"calibration_text": found.description, "calibration_digest": found.digest}
    settings = _settings(job, device, dtype)
    key = fingerprint("quantize", settings, job.shard_bytes, model.checkpoint.hashes, text["calibration_digest"])
    progress = writing.read_progress(job.out, key) if options.resume else None
    job, bits = _with_bits(job, found.tokens, (device, dtype), progress, bars)
    extra = {f"{peft.FOLDER}/{peft.WEIGHTS}": job.adapter_plan} if job.rank else {}
    with writing.Writer(job.out, job.plan, job.shard_bytes, key, extra) as writer:
        finished: dict[str, Model] = {}
        if progress:
            writer.resume(progress)
            finished |= dict.fromkeys(writer.done, _written(job, writer))
        else:
            writer.start(_configuration(job), model.checkpoint.folder, layouts.own_files(model))
            writer.facts |= {"blocks": [], **bits}
        _run(job, found.tokens[:-HELD_BACK], (device, dtype), finished, writer, bars)
        scores = _held_back(job, _written(job, writer), found.tokens[-HELD_BACK:], (device, dtype))
        summary = _summary(job, scores)
        writer.commit(manifest("quantize", settings, model.checkpoint, writer.hashes(), writer.facts | summary | text))
    return _result(job, writer, settings) | summary


def _with_bits(
    job: Job, tokens: torch.Tensor, where: tuple[torch.device, torch.dtype], progress: dict[str, Any] | None, bars: ProgressBars
) -> tuple[Job, dict[str, Any]]:
    """(the job with each block's own grid, facts about it): measured, or what an interrupted run had measured."""
    method, model = job.method, job.model
    if not isinstance(method, GridMethod) or not method.mixed:
        return job, {}
    from compresskit.checkpoint.dtypes import TORCH_DTYPES
    from compresskit.quantize.mixed import allot_bits, block_losses
    from compresskit.quantize.sequential import Request
    from compresskit.walk import Walk

    if progress:
        facts = {key: progress["facts"][key] for key in ("bits", "losses")}
    else:
        walk = Walk(model, tokens[:MIXED_WINDOWS], *where, job.options.trust_remote_code)
        levels = [method.scheme_of(model, bits) for bits in method.levels]
        losses = block_losses(walk, Request(job.schemes, TORCH_DTYPES[job.scale_dtype]), levels, bars)
        sizes = [0] * model.block_count
        for name in job.schemes:
            sizes[model.block_of(name)] += math.prod(model.linear_shape(name))
        facts = {"bits": allot_bits(losses, sizes, method.bits), "losses": losses}
    of_bits = {bits: method.scheme_of(model, bits) for bits in method.levels}
    schemes: dict[str, Scheme | None] = {name: of_bits[facts["bits"][model.block_of(name)]] for name in job.schemes}
    return replace(job, schemes=schemes), facts


def _written(job: Job, writer: writing.Writer) -> Model:
    """What is in the partial folder; an adapter gets its configuration first, with the scales of the finished blocks."""
    if job.rank:
        found = {job.model.block_name(i): facts.get("adapter_scales", {}) for i, facts in enumerate(writer.facts["blocks"])}
        text = peft.config_text(str(job.out.resolve()), dict.fromkeys(job.schemes, job.rank), peft.scales_by_name(found))
        writer.write_text(f"{peft.FOLDER}/{peft.CONFIG}", text)
    return with_adapter(open_model(writer.partial), None)


def _run(
    job: Job,
    tokens: torch.Tensor,
    where: tuple[torch.device, torch.dtype],
    finished: dict[str, Model],
    writer: writing.Writer,
    bars: ProgressBars,
) -> None:
    """Walk the model once, or the original and the result side by side."""
    from compresskit.checkpoint.dtypes import TORCH_DTYPES
    from compresskit.quantize import sequential, two_streams
    from compresskit.walk import Walk, micro_batch_size

    def walk(micro_batch: int | None = None, follows: bool = True) -> Walk:
        source_of = (lambda i: finished.get(f"block {i}")) if follows else (lambda i: None)
        return Walk(job.model, tokens, *where, job.options.trust_remote_code, source_of, micro_batch)

    method = job.method
    dtypes = TORCH_DTYPES[job.scale_dtype], TORCH_DTYPES[job.factor_dtype]
    request = sequential.Request(job.schemes, dtypes[0], job.rank, dtypes[1])
    if not isinstance(method, BlockMethod):
        sequential.quantize_blocks(method, walk(), request, writer, bars)
        return
    with tempfile.TemporaryDirectory(dir=writer.partial.parent, prefix=f".{job.out.name}.scratch-") as scratch:
        saliencies: two_streams.Saliencies = lambda index: {}  # noqa: E731
        if method.needs_fisher:
            from compresskit.quantize.saliency import fisher_diagonals

            names = list(job.schemes)
            part = walk(1, follows=False).take(FISHER_WINDOWS)
            saliencies = fisher_diagonals(part, names, Path(scratch), bars)
        size = min(method.windows_at_once, micro_batch_size(job.model, tokens.shape[1]))
        two_streams.quantize_blocks(method, (walk(size, follows=False), walk(size)), request, saliencies, writer, bars)


def _configuration(job: Job) -> dict[str, Any]:
    """config.json: the source's keys, and how the linears are stored."""
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[weight_dtype(job.model)]
    dense = [name for name in job.model.linears if name not in job.schemes]
    config = dict(job.model.checkpoint.config)
    if job.method.embedding_bits == 16 and dtype == "float32":
        dtype = config["dtype"] = "float16"
    config["quantization_config"] = job.method.configuration(job.schemes, [HEAD, *dense], dtype)
    return config


def _settings(job: Job, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Everything that decides the weights, besides the source and the text."""
    shared = job.options.model_dump(include={"calibration", "samples", "sequence_length", "seed"})
    used = {"dtype": str(dtype).removeprefix("torch."), "device": device.type}
    chosen = next(iter(job.schemes.values()))
    grid = {"group_size": chosen.group_size, "symmetric": chosen.symmetric} if chosen else {}
    return {"method": name_of("quantize", job.method), **job.method.model_dump(), **grid, **shared, **used}


def _held_back(job: Job, quantised: Model, windows: torch.Tensor, where: tuple[torch.device, torch.dtype]) -> Scores:
    """Scores of the result against its source on the windows that the method never saw."""
    from compresskit.evaluate.language_modelling import score

    return score(quantised, windows, *where, reference=job.model)


def _summary(job: Job, scores: Scores) -> dict[str, Any]:
    from compresskit.evaluate.scores import collapse_warning

    return {
        "bits_per_weight": stored_bits(job),
        "kl_held_back": scores.kl,
        "top1_held_back": scores.top1_agreement,
        "dense_linears": [name for name in job.model.linears if name not in job.schemes],
        "warning": collapse_warning(scores),
    }


def stored_bits(job: Job) -> float:
    """Stored bits a weight of the quantised linears: codes, scales, zero points, adapter."""
    stored, weights = sum(spec.bytes for spec in job.adapter_plan), 0
    for name, scheme in job.schemes.items():
        shape = job.model.linear_shape(name)
        stored += sum(spec.bytes for spec in job.method.plan(name, shape, scheme, job.scale_dtype))
        weights += math.prod(shape)
    return BITS_PER_BYTE * stored / weights


def _result(job: Job, writer: writing.Writer, settings: dict[str, Any]) -> dict[str, Any]:
    checkpoint, parameters = job.model.checkpoint, job.model.parameters
    written = parameters, sum(shard.size for shard in writer.shards)
    return stage_result("quantize", settings, job.out, checkpoint.folder, (parameters, checkpoint.bytes), written)
