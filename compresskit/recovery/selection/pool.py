"""What a selection asks of the two models, computed when it is asked for and kept until the recovery is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from compresskit import calibration
from compresskit.checkpoint import folder as folders
from compresskit.checkpoint.reader import read_json
from compresskit.machine.precision import matrix_products
from compresskit.machine.progress import ProgressBars
from compresskit.recovery.data.encoding import open_tokenizer
from compresskit.recovery.forward import open_walk
from compresskit.recovery.method import Lost, Pool
from compresskit.recovery.selection import degradation, embeddings
from compresskit.recovery.training.finetune import VECTORS

if TYPE_CHECKING:
    from compresskit.recovery.run import Job

    Where = tuple[torch.device, torch.dtype]

STATES = "states.safetensors"
"""The compressed model's states of the pool, from the pass that measured what was lost."""
DEGRADATIONS = "degradations.json"
PARTS = "lost"
"""Folder of what was measured so far."""


def open_pool(job: Job, where: Where, bars: ProgressBars) -> Pool:
    """The samples, and how what costs passes of a model is computed; an interrupted run's passes are not repeated."""
    return Pool(
        job.pool,
        job.options.seed,
        lambda embedder: _vectors(job, where, bars, embedder),
        lambda: _degradations(job, where, bars),
        lambda: _target(job, where, bars),
    )


def _vectors(job: Job, where: Where, bars: ProgressBars, embedder: str) -> torch.Tensor:
    """Of the pool; those of what is held back are made with them, for the report by cluster."""
    file = job.workspace / VECTORS
    if not file.is_file():
        progress = lambda done, total: bars("embedding samples", done, total)  # noqa: E731
        samples = [*job.pool, *job.held_back]
        if embedder:
            found = embeddings.encoder_embeddings(Path(embedder), [s.instruction.text for s in samples], progress)
        else:
            known = job.workspace / STATES
            states = [load_file(known)["states"]] if known.is_file() else []
            walk = open_walk(job.model, *where, job.options.trust_remote_code)
            with matrix_products(where[0], job.options.precision):
                states.append(embeddings.own_states(walk, job.held_back if states else samples, progress))
            found = embeddings.centred(torch.cat(states))
        folders.write_whole_tensors(file, {"vectors": found})
    vectors: torch.Tensor = load_file(file)["vectors"]
    return vectors[: len(job.pool)]


def _degradations(job: Job, where: Where, bars: ProgressBars) -> Lost:
    """What the compressed model lost on each sample of the pool."""
    file = job.workspace / DEGRADATIONS
    if not file.is_file():
        original, compressed = (open_walk(each, *where, job.options.trust_remote_code) for each in (job.original, job.model))
        progress = lambda done, total: bars("measuring what was lost", done, total)  # noqa: E731
        with matrix_products(where[0], job.options.precision):
            divergences, losses, states = degradation.degradations(
                original, compressed, job.pool, progress, job.workspace / PARTS
            )
        folders.write_whole_tensors(job.workspace / STATES, {"states": states})
        folders.write_whole(file, json.dumps(Lost(divergences, losses)._asdict()))
        shutil.rmtree(job.workspace / PARTS, ignore_errors=True)
    return Lost(**read_json(file))


def _target(job: Job, where: Where, bars: ProgressBars) -> list[str]:
    """Texts of the distribution that is to be recovered."""
    options = job.options
    found = calibration.calibrate(
        options.calibration, job.original, options.samples, options.sequence_length, options.seed, *where,
        options.trust_remote_code, lambda done, total: bars("sampling text", done, total),
    )  # fmt: skip
    texts: list[str] = open_tokenizer(job.model.checkpoint.folder, options.trust_remote_code).batch_decode(found.tokens)
    return texts
