"""Model-based inputs of a selection, computed on demand and kept until the recovery is complete."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from compresskit import distributed
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import write_whole, write_whole_tensors
from compresskit.machine.precision import matrix_products
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recovery.forward import open_walk
from compresskit.recovery.method import Lost, Pool
from compresskit.recovery.selection import degradation, embeddings
from compresskit.recovery.selection.files import VECTORS
from compresskit.recovery.texts import calibration_windows
from compresskit.recovery.work import Recovery

STATES = "states.safetensors"
"""File with the compressed model's states of the pool, from the pass that measures degradation."""
DEGRADATIONS = "degradations.json"
PARTS = "lost"
"""Folder of the finished measurements."""


def open_pool(recovery: Recovery) -> Pool:
    """Build the pool with on-demand values; passes finished by an interrupted run are not repeated."""
    return Pool(
        recovery.data.pool,
        recovery.request.options.seed,
        embeddings=partial(_vectors, recovery),
        lost=partial(_lost, recovery),
        target=partial(_target, recovery),
    )


def _vectors(recovery: Recovery, embedder: str) -> torch.Tensor:
    """Vectors of the pool; those of the held-back samples are computed with them, for the report by cluster."""
    data, file = recovery.data, recovery.request.workspace / VECTORS
    if not distributed.from_first(file.is_file):
        progress = recovery.bars.of("embedding samples")
        samples = [*data.pool, *data.held_back]
        if embedder:
            texts = [s.instruction.text for s in samples]
            found = distributed.from_first(lambda: embeddings.encoder_embeddings(Path(embedder), texts, progress))
        else:
            known = recovery.request.workspace / STATES
            states = [load_file(known)["states"]] if distributed.from_first(known.is_file) else []
            walk = open_walk(recovery.request.model, recovery.where)
            with matrix_products(recovery.where.device, recovery.request.options.precision):
                states.append(embeddings.own_states(walk, data.held_back if states else samples, progress))
            found = embeddings.centred(torch.cat(states))
        distributed.from_first(lambda: write_whole_tensors(file, {"vectors": found}))
    vectors: torch.Tensor = load_file(file)["vectors"]
    return vectors[: len(data.pool)]


def _lost(recovery: Recovery) -> Lost:
    """The compressed model's degradation on each sample of the pool."""
    workspace = recovery.request.workspace
    file = workspace / DEGRADATIONS
    if not distributed.from_first(file.is_file):
        original, compressed = (open_walk(each, recovery.where) for each in (recovery.original, recovery.request.model))
        progress = recovery.bars.of("measuring what was lost")
        with matrix_products(recovery.where.device, recovery.request.options.precision):
            divergences, losses, states = degradation.degradations(
                original, compressed, recovery.data.pool, progress, workspace / PARTS
            )
        if distributed.is_first():
            write_whole_tensors(workspace / STATES, {"states": states})
            write_whole(file, json.dumps(Lost(divergences, losses)._asdict()))
            shutil.rmtree(workspace / PARTS, ignore_errors=True)
        distributed.wait()
    return Lost(**read_json(file))


def _target(recovery: Recovery) -> list[str]:
    """Texts of the target distribution."""
    options = recovery.request.options
    tokenizer = open_tokenizer(recovery.request.model.checkpoint.folder, options.trust_remote_code)
    texts: list[str] = tokenizer.batch_decode(
        calibration_windows(recovery.request, recovery.where, recovery.bars, options.samples)
    )
    return texts
