"""The recover stage: check the request and the data, choose, fine-tune, merge or keep the adapter, report.

What is done is kept in `OUT.training/` until the result is whole: the selection, the original's predictions, the
training's checkpoints. `--resume` goes on from there.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint import folder as folders
from compresskit.checkpoint import source
from compresskit.checkpoint import writer as writing
from compresskit.checkpoint.manifest import fingerprint
from compresskit.checkpoint.reader import read_json
from compresskit.errors import RequestError
from compresskit.evaluation.scores import check_comparable, check_context
from compresskit.machine.device import choose_device, parse_bytes
from compresskit.machine.memory import peak_memory_bytes
from compresskit.machine.progress import ProgressBars, timed
from compresskit.methods import name_of
from compresskit.models.load import open_any, open_model
from compresskit.models.model import Model
from compresskit.recovery.data.duplicates import drop_duplicates
from compresskit.recovery.data.encoding import Sample, check_same_tokenizer, encode_samples, open_tokenizer
from compresskit.recovery.data.held_back import hold_back
from compresskit.recovery.data.instructions import read_instructions
from compresskit.recovery.method import RecoverOptions, Selection, SelectionMethod
from compresskit.recovery.selection.files import read_selection, selection_lines, write_selection

if TYPE_CHECKING:
    import torch

    Where = tuple[torch.device, torch.dtype]

EXTRAS = ("accelerate", "peft", "scipy")
"""What the extra `recover` installs."""
REQUEST = "request.json"
ADAPTER_BYTES = 4


@dataclass(frozen=True)
class Job:
    """A request that has passed all checks."""

    method: SelectionMethod
    model: Model
    original: Model
    pool: list[Sample]
    held_back: list[Sample]
    reading: dict[str, Any]
    """What was read and left out."""
    out: Path
    options: RecoverOptions
    shard_bytes: int
    seconds: dict[str, float] = field(default_factory=dict)
    """What each part of the work took, of this process alone."""

    @property
    def workspace(self) -> Path:
        """Where unfinished work is kept."""
        return self.out.with_name(self.out.name + ".training")


def recover(method: SelectionMethod, source_name: str, out: Path, options: RecoverOptions, quiet: bool = True) -> dict[str, Any]:
    """Choose data and fine-tune a compressed checkpoint on it.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; nothing then appears under `out`.
    """
    started = time.monotonic()
    shard_bytes = parse_bytes(options.max_shard_size)
    _check_extras(options)
    model = open_any(source_name, options.trust_remote_code)
    original = open_model(source.resolve(options.original), options.trust_remote_code)
    job = _checked(method, (model, original), out, options, shard_bytes)
    with ProgressBars(quiet) as bars:
        result = _recover(job, bars)
    shares = {what: round(value, 2) for what, value in job.seconds.items()}
    total = round(time.monotonic() - started, 3)
    return result | {"time_shares": shares, "seconds": total, "peak_memory_bytes": peak_memory_bytes()}


def _check_extras(options: RecoverOptions) -> None:
    needed = ("scipy",) if options.select_only else EXTRAS
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"recover: {', '.join(missing)} not installed; pip install 'compresskit[recover]'")


def _checked(method: SelectionMethod, models: tuple[Model, Model], out: Path, options: RecoverOptions, shard_bytes: int) -> Job:
    """What can be refused before any work; the data is read and encoded here."""
    model, original = models
    folder = model.checkpoint.folder
    if not options.data:
        raise RequestError("--data: no instruction data given; pass --data FILE.jsonl")
    if options.data_weight is not None and options.loss != "distill":
        raise RequestError(
            "--data-weight: weighs the data's tokens against the original's predictions; give --loss distill, or leave it out"
        )
    check_same_tokenizer(folder, original.checkpoint.folder, options.trust_remote_code)
    check_comparable(model, original)
    check_context(model, options.sequence_length)
    if model.architecture.experts and (options.adapter_only or model.quantized):
        raise RequestError(
            f"{model.family}: peft loads no adapters of its experts; recover a dense checkpoint, without --adapter-only"
        )
    if options.update == "full" and (options.adapter_only or model.quantized or model.adapter):
        raise RequestError(
            f"{folder}: --update full trains whole weights, of a dense source; use --update low-rank where weights are low-bit, "
            "or an adapter is wanted or already there"
        )
    writing.check_out(out, folder, model.bytes + ADAPTER_BYTES * _adapter_numbers(model, options.rank), options.overwrite)
    reading = read_instructions([Path(path).expanduser() for path in options.data])
    kept, dropped = drop_duplicates([sample.text for sample in reading.samples])
    reading.dropped |= dropped
    if options.pool and options.pool < len(kept):
        kept = sorted(random.Random(options.seed).sample(kept, options.pool))  # noqa: S311
    reading.samples = [reading.samples[i] for i in kept]
    tokenizer = open_tokenizer(folder, options.trust_remote_code)
    samples = encode_samples(reading, tokenizer, options.sequence_length)
    pool, held = hold_back(samples, options.held_back, options.seed)
    template = "chat template" if getattr(tokenizer, "chat_template", None) else "Alpaca prompt"
    facts = {"shapes": reading.shapes, "dropped": reading.dropped, "prompt": template, "pool": len(pool), "held_back": len(held)}
    return Job(method, model, original, pool, held, facts, out, options, shard_bytes)


def _adapter_numbers(model: Model, rank: int) -> int:
    return sum(rank * sum(model.linear_shape(name)) for name in model.linears)


def _recover(job: Job, bars: ProgressBars) -> dict[str, Any]:
    """The work itself, once everything has been checked."""
    where = choose_device(job.options.device, job.options.dtype, job.model)
    settings = _settings(job, where)
    _open_workspace(job, settings)
    selection = _select(job, where, bars)
    if job.options.select_only:
        from compresskit.recovery.output import write_selection_only

        result = write_selection_only(job, selection, settings)
    else:
        result = _train(job, selection, settings, where, bars)
    shutil.rmtree(job.workspace, ignore_errors=True)
    return result


def _settings(job: Job, where: Where) -> dict[str, Any]:
    """Everything that decides the weights, besides the models and the data."""
    left_out = {"device", "dtype", "max_shard_size", "overwrite", "resume", "trust_remote_code", "original", "data"}
    used = {"device": where[0].type, "dtype": str(where[1]).removeprefix("torch.")}
    files = {"data": [Path(path).name for path in job.options.data]}
    chosen = job.options.model_dump(exclude=left_out)
    return {"method": name_of("recover", job.method), **job.method.model_dump(), **chosen, **files, **used}


def _open_workspace(job: Job, settings: dict[str, Any]) -> None:
    """Go on in what an interrupted run of the same request left, or begin anew.

    Raises:
        RequestError: it was left by another request.
    """
    texts = [sample.tokens for sample in (*job.pool, *job.held_back)]
    adapter = job.model.adapter.store.hashes if job.model.adapter else None
    key = fingerprint("recover", settings, job.model.checkpoint.hashes, adapter, job.original.checkpoint.hashes, texts)
    request = job.workspace / REQUEST
    if job.options.resume and request.is_file():
        if read_json(request).get("fingerprint") != key:
            raise RequestError(f"{job.workspace}: left by a run with other inputs or settings; repeat those, or drop --resume")
        return
    shutil.rmtree(job.workspace, ignore_errors=True)
    job.workspace.mkdir(parents=True)
    folders.write_whole(request, json.dumps({"fingerprint": key}))


def _select(job: Job, where: Where, bars: ProgressBars) -> Selection:
    """What the method chooses, or what the interrupted run had chosen."""
    earlier = read_selection(job.workspace)
    if earlier is not None:
        return earlier
    from compresskit.recovery.selection.pool import open_pool

    with timed(job.seconds, "selection"):
        selection = job.method.select(open_pool(job, where, bars))
    write_selection(job.workspace, selection)
    return selection


def _train(job: Job, selection: Selection, settings: dict[str, Any], where: Where, bars: ProgressBars) -> dict[str, Any]:
    from compresskit.recovery.output import write_adapter, write_checkpoint
    from compresskit.recovery.training.finetune import fine_tune, held_back_losses

    before = _before(job, where, bars)
    training = fine_tune(job, selection, where, bars)
    facts = {**job.reading, "selected": len(selection.choices), **selection.facts, **training.facts, "held_back_before": before}
    measure = lambda model: held_back_losses(job, model, where)  # noqa: E731
    write = write_adapter if job.options.adapter_only else write_checkpoint
    lines = selection_lines(selection, job.pool)
    return write(job, (settings, facts, lines), training, measure)


def _before(job: Job, where: Where, bars: ProgressBars) -> dict[str, Any] | None:
    """Held-back losses of the source, which an interrupted run may have measured."""
    from compresskit.recovery.training.finetune import held_back_losses

    file = job.workspace / "before.json"
    if not file.is_file():
        bars("held-back loss", 0, 1)
        folders.write_whole(file, json.dumps({"before": held_back_losses(job, job.model, where)}))
        bars("held-back loss", 1, 1)
    found: dict[str, Any] | None = read_json(file)["before"]
    return found
