"""What recover writes: a merged checkpoint, a low-bit checkpoint with its adapter, an adapter alone, or a selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint import folder as folders
from compresskit.checkpoint.manifest import NAME, fingerprint, manifest
from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.writer import Writer
from compresskit.formats import peft
from compresskit.job import stage_result
from compresskit.models import layouts
from compresskit.models.load import open_model, with_adapter
from compresskit.models.model import Model
from compresskit.recovery.method import Selection
from compresskit.recovery.selection.files import FILE, selection_lines

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.recovery.run import Job
    from compresskit.recovery.training.finetune import Training

REPORT = "recover.json"
ADAPTER_DTYPE = "F32"
Account = tuple[dict[str, Any], dict[str, Any], str]
"""(settings, facts, the selection's lines)."""
Measure = Callable[[Model], dict[str, Any] | None]


def write_selection_only(job: Job, selection: Selection, settings: dict[str, Any]) -> dict[str, Any]:
    """A folder with the selection, its report and the manifest."""
    facts = {**job.reading, "selected": len(selection.choices), **selection.facts}
    partial = folders.start_folder(job.out)
    _write_reports(partial, facts, selection_lines(selection, job.pool))
    made = manifest("recover", settings, job.model.checkpoint, {}, facts)
    folders.write_json(partial / NAME, made)
    folders.commit_folder(job.out)
    return _result(job, settings, facts, (job.model.parameters, job.model.bytes))


def write_adapter(job: Job, account: Account, training: Training, measure: Measure) -> dict[str, Any]:
    """A PEFT adapter for the source as it is; it takes the place of an adapter that the source has."""
    from safetensors.torch import save_file

    settings, facts, lines = account
    partial = folders.start_folder(job.out)
    tensors: dict[str, Tensor] = {}
    for name, pair in training.factors.items():
        tensors |= {key: part.contiguous() for key, part in zip(peft.factor_names(name), pair, strict=True)}
    save_file(tensors, partial / peft.WEIGHTS, metadata={"format": "pt"})
    (partial / peft.WEIGHTS).chmod(folders.FILE_MODE)
    base = str(job.model.checkpoint.folder.resolve())
    (partial / peft.CONFIG).write_text(peft.config_text(base, _ranks(training)), encoding="utf-8")
    found = with_adapter(job.model, partial)
    facts = facts | {"held_back_after": measure(found)}
    _write_reports(partial, facts, lines)
    hashes = {peft.WEIGHTS: sha256(partial / peft.WEIGHTS)}
    made = manifest("recover", settings, job.model.checkpoint, hashes, facts)
    folders.write_json(partial / NAME, made)
    folders.commit_folder(job.out)
    numbers = sum(part.numel() for pair in training.factors.values() for part in pair)
    return _result(job, settings, facts, (numbers, (job.out / peft.WEIGHTS).stat().st_size))


def write_checkpoint(job: Job, account: Account, training: Training, measure: Measure) -> dict[str, Any]:
    """The checkpoint with the update merged in, or, where the weights are low-bit, with the adapter beside them."""
    settings, facts, lines = account
    model = job.model
    plan = list(model.checkpoint.tensors.values())
    beside = model.quantized
    shapes = {name: model.linear_shape(name) for name in training.factors}
    ranks = _ranks(training)
    adapter = [spec for name in ranks for spec in peft.plan(name, shapes[name], ranks[name], ADAPTER_DTYPE)]
    extra = {f"{peft.FOLDER}/{peft.WEIGHTS}": adapter} if beside else {}
    with Writer(job.out, plan, job.shard_bytes, fingerprint("recover", settings), extra) as writer:
        writer.start(dict(model.checkpoint.config), model.checkpoint.folder, _side_files(job, ranks if beside else {}))
        if beside:
            writer.copy(list(model.checkpoint.tensors), model.checkpoint)
            for name, pair in training.factors.items():
                for key, part in zip(peft.factor_names(name), pair, strict=True):
                    writer.put(key, part)
        else:
            _merge(model, training, writer)
        found = with_adapter(open_model(writer.partial, job.options.trust_remote_code), None)
        facts = facts | {"held_back_after": measure(found)}
        _write_reports(writer.partial, facts, lines)
        writer.commit(manifest("recover", settings, model.checkpoint, writer.hashes(), facts))
    found = with_adapter(open_model(job.out, job.options.trust_remote_code), None)
    return _result(job, settings, facts, (found.parameters, found.bytes))


def _merge(model: Model, training: Training, writer: Writer) -> None:
    """What was trained, or W + B A of it, in the dtype in which W is stored; all else bit for bit."""
    from compresskit.machine.precision import torch_dtype
    from compresskit.models import meta

    stored = replace(model, adapter=None)
    trained = training.weights or [f"{name}.weight" for name in training.factors]
    names = {model.stored_name(name): name for name in trained}
    writer.copy([name for name in model.checkpoint.tensors if name not in names], model.checkpoint)
    for key, name in names.items():
        weight = training.weights[name] if training.weights else _updated(stored, name, training)
        dtype = torch_dtype(model.checkpoint.spec(key).dtype)
        writer.put(key, meta.to_stored(stored, name, weight.to(dtype)))


def _updated(model: Model, name: str, training: Training) -> Tensor:
    from compresskit.models import meta

    first, second = training.factors[name.removesuffix(".weight")]
    return meta.read_plain(model, name).float() + second @ first


def _side_files(job: Job, ranks: dict[str, int]) -> dict[str, str]:
    """Generated files of a ragged source, and the configuration of the adapter."""
    files = layouts.own_files(job.model)
    if ranks:
        files[f"{peft.FOLDER}/{peft.CONFIG}"] = peft.config_text(str(job.out.resolve()), ranks)
    return files


def _ranks(training: Training) -> dict[str, int]:
    return {name: first.shape[0] for name, (first, _) in training.factors.items()}


def _write_reports(folder: Path, facts: dict[str, Any], lines: str) -> None:
    (folder / FILE).write_text(lines, encoding="utf-8")
    folders.write_json(folder / REPORT, facts)


def _result(job: Job, settings: dict[str, Any], facts: dict[str, Any], after: tuple[int, int]) -> dict[str, Any]:
    """`after`: (parameters, bytes) of what was written."""
    left_out = ("losses", "ranks")
    before = job.model.parameters, job.model.bytes
    found = stage_result("recover", settings, job.out, job.model.checkpoint.folder, before, after)
    return found | {key: value for key, value in facts.items() if key not in left_out}
