"""Write the result of recover: a merged checkpoint, a low-bit checkpoint with its adapter, an adapter, or a selection."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from compresskit import distributed
from compresskit.checkpoint.manifest import manifest
from compresskit.checkpoint.results import stage_result
from compresskit.checkpoint.writer import Writer
from compresskit.formats import peft
from compresskit.models.load import open_model, with_adapter
from compresskit.models.model import Model
from compresskit.recovery.method import Selection
from compresskit.recovery.request import RecoverRequest
from compresskit.recovery.selection.files import FILE, selection_lines
from compresskit.recovery.work import Recovery

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.recovery.training.finetune import Training

REPORT = "recover.json"
LONG_FACTS = ("losses", "ranks", "spans")
"""Facts that the report contains but `--json` does not print."""


def write(recovery: Recovery, selection: Selection, training: Training | None, facts: dict[str, Any]) -> dict[str, Any]:
    """Write OUT: the selection, its report, the manifest, and the trained weights, if any.

    Returns:
        The recovery's part of the `--json` output.
    """
    request, settings, source = recovery.request, recovery.settings, recovery.request.model.checkpoint
    before = after = request.model.parameters, request.model.bytes
    writer = Writer(recovery.work, request.outputs(), request.options.shard_bytes, lambda: recovery.key)
    writer.start(source.folder)
    if training is not None:
        from compresskit.recovery.losses import held_back_losses

        _write_weights(request, training, writer)
        distributed.wait()
        written = _written(request, writer)
        after = writer.written if request.options.adapter_only else (written.parameters, written.bytes)
        facts = facts | {"held_back_after": held_back_losses(recovery, written)}
    writer.write_text(FILE, selection_lines(selection, recovery.data.pool))
    writer.write_text(REPORT, json.dumps(facts, indent=1) + "\n")
    made = manifest(request.stage, settings, source, writer.hashes(), facts) if distributed.is_first() else {}
    writer.commit(made)
    found = stage_result(request.stage, settings, request.out, source, before, after)
    return found | {key: value for key, value in facts.items() if key not in LONG_FACTS}


def _write_weights(request: RecoverRequest, training: Training, writer: Writer) -> None:
    """Write the trained grid, the factors of an adapter, or merge the weights; everything else is copied bit for bit."""
    if request.options.update == "grid":
        for name, tensor in training.stored.items():
            writer.put(request.model.stored_name(name), tensor)
    elif request.options.adapter_only or request.model.quantized:
        multipliers = peft.multipliers(request.ranks)
        for name, (first, second) in training.factors.items():
            for key, part in zip(peft.factor_names(name), (first, second / multipliers[name]), strict=True):
                writer.put(key, part)
    else:
        _merge(request.model, training, writer)
    writer.copy_missing((training.source or request.model).checkpoint)


def _merge(model: Model, training: Training, writer: Writer) -> None:
    """Write the trained weights, or W + B A, in the dtype of W."""
    from compresskit.machine.precision import torch_dtype
    from compresskit.models import meta

    plain = replace(model, adapter=None)
    for name in training.weights or [f"{name}.weight" for name in training.factors]:
        weight = training.weights[name] if training.weights else _updated(plain, name, training)
        key = model.stored_name(name)
        writer.put(key, meta.to_stored(plain, name, weight.to(torch_dtype(model.checkpoint.spec(key).dtype))))


def _updated(model: Model, name: str, training: Training) -> Tensor:
    """Compute W + B A of one linear, float32."""
    from compresskit.models import meta

    first, second = training.factors[name.removesuffix(".weight")]
    return meta.read_plain(model, name).float() + second @ first


def _written(request: RecoverRequest, writer: Writer) -> Model:
    """Open the partial folder: the checkpoint, or the source with the adapter."""
    if request.options.adapter_only:
        return with_adapter(request.model, writer.partial)
    return with_adapter(open_model(writer.partial, request.options.trust_remote_code), None)
