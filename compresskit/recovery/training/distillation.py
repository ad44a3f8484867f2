"""The original's predictions for training samples, computed once by the walk and stored on disk.

For every position the `TOP` most likely tokens and their log-probabilities are stored. The mass of all other tokens is one
more outcome, known because probabilities sum to 1. With a vocabulary of 49,152 this is 0.2% of the whole distribution.

The data's own next tokens can be mixed in: soft and hard targets as in arXiv 1503.02531, section 2, at temperature 1.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compresskit import distributed
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import write_whole
from compresskit.errors import CheckpointError
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.forward import chunks, predictions, walked
from compresskit.walk.cost import FLOAT32_BYTES
from compresskit.walk.walk import Walk

TOP = 64
"""Tokens stored per position."""
FILES = {"tokens.i32": np.int32, "log_probabilities.f16": np.float16}
STATE = "teacher.json"
"""File with the number of finished chunks of samples."""
CHUNK_BYTES = 16 << 20
"""Float32 logits per chunk when losses and gradients are computed; a small chunk stays in memory that was just used."""
SMALLEST = torch.finfo(torch.float32).tiny
"""Lower bound of probabilities in logarithms: float32 rounds smaller ones to 0 on devices without denormals."""
SMALLEST_REST = 1e-6
"""Lower bound of the mass of all other tokens; the rounding of float16 log-probabilities is larger."""


Part = tuple[Any, Any, Any]
"""Numpy arrays: places in the files (rows,), tokens (rows, width) int32, log-probabilities (rows, width) float16."""


class TeacherPredictions:
    """The original's most likely tokens by sample, memory-mapped so that they take no memory."""

    def __init__(self, folder: Path, lengths: Sequence[int], width: int):
        """`lengths`: tokens of every sample, 1 for samples without predictions; position t predicts token t + 1.

        `width`: tokens stored per position.
        """
        self.offsets = np.concatenate([[0], np.cumsum([length - 1 for length in lengths])])
        self.folder, self.width = folder, width

    def reserve(self) -> None:
        """Create the files of `open` and reserve their disk space.

        Raises:
            CheckpointError: the disk is full.
        """
        for name, kind in FILES.items():
            _reserve(self.folder / name, int(self.offsets[-1]) * self.width * np.dtype(kind).itemsize)

    def open(self, mode: Literal["r", "r+"] = "r") -> tuple[np.memmap, np.memmap]:
        """Open (token numbers int32, log-probabilities float16), each (positions of all samples, width)."""
        shape = (int(self.offsets[-1]), self.width)
        tokens, values = (np.memmap(self.folder / name, kind, mode, shape=shape) for name, kind in FILES.items())
        return tokens, values

    def read(self, sample: int) -> tuple[Tensor, Tensor]:
        """Read (token numbers (length - 1, width) int64, log-probabilities float32) of one sample."""
        tokens, values = self.open()
        part = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
        return torch.from_numpy(tokens[part].astype(np.int64)), torch.from_numpy(values[part].astype(np.float32))


def _reserve(file: Path, size: int) -> None:
    """Create an empty file of this size with reserved disk space: a memory-mapped file that runs out kills the process."""
    with file.open("wb") as opened:
        try:
            opened.truncate(size)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(opened.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system cannot reserve space
                return
            raise CheckpointError(
                f"{file}: no room for the original's predictions, {size / 1e9:.1f} GB ({error.strerror}); free some space"
            ) from error


def width_of(vocabulary: int) -> int:
    """Tokens stored per position: `TOP`, or fewer for a smaller vocabulary."""
    return min(TOP, vocabulary - 1)


def predict(
    walk: Walk,
    samples: Sequence[Sample],
    wanted: Sequence[int],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherPredictions:
    """Predict every token with the model; reuses chunks that an earlier run for the same samples left in the folder.

    Ranks share the predicting; the first writes.

    Returns:
        The predictions for the samples at the positions `wanted`; the other samples have none.
    """
    among = set(wanted)
    lengths = [len(sample.tokens) if i in among else 1 for i, sample in enumerate(samples)]
    predicted = TeacherPredictions(folder, lengths, width_of(walk.model.vocabulary))
    known = distributed.from_first(lambda: _known(predicted))
    done = 0
    for number, chunk in enumerate(chunks([samples[i] for i in wanted], walk.model.hidden_size)):
        if number >= known:
            parts = distributed.every(_predicted(predicted, walk, samples, [wanted[i] for i in chunk]))
            if distributed.is_first():
                _write(predicted, itertools.chain(*parts))
                write_whole(folder / STATE, json.dumps({"chunks": number + 1}))
        done += len(chunk)
        if progress:
            progress(done, len(wanted))
    distributed.wait()
    return predicted


def _known(predicted: TeacherPredictions) -> int:
    """Number of chunks that an earlier run left; the files are there afterwards."""
    folder = predicted.folder
    folder.mkdir(parents=True, exist_ok=True)
    stated = read_json(folder / STATE).get("chunks") if (folder / STATE).is_file() else 0
    known = stated if isinstance(stated, int) else 0
    if not known:
        predicted.reserve()
    return known


def _predicted(predicted: TeacherPredictions, walk: Walk, samples: Sequence[Sample], chunk: Sequence[int]) -> list[Part]:
    """Predictions for the samples at these positions, of this rank's micro-batches."""
    offsets, members = torch.from_numpy(predicted.offsets[chunk]), [samples[i] for i in chunk]
    found = []
    for rows in predictions(walked([walk], members), members, whole=True):
        top = rows.logits[0].log_softmax(dim=-1).topk(predicted.width, dim=-1)
        places = (offsets[rows.owners] + rows.positions).numpy()
        found.append((places, top.indices.int().cpu().numpy(), top.values.half().cpu().numpy()))
    return found


def _write(predicted: TeacherPredictions, parts: Iterable[Part]) -> None:
    """Write predictions to disk."""
    tokens, values = predicted.open("r+")
    for places, top, log_probabilities in parts:
        tokens[places] = top
        values[places] = log_probabilities
    tokens.flush()
    values.flush()


def with_hard_targets(tokens: Tensor, log_probabilities: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the teacher's distribution p with the text's own next token y: (1 - w) p + w [y], at every position.

    tokens (positions, width) int64, the most likely first, and their log_probabilities float32; targets (positions,) int64;
    weights w (positions,) from 0 to 1. The gradient of the divergence from it is that of (1 - w) KL + w cross-entropy.

    Returns:
        Tokens and log-probabilities of the mixture. A target outside the stored tokens replaces the last of them. The mass of
        the replaced token moves to the rest; the target's own smaller teacher probability stays in the rest.
    """
    is_target = tokens == targets[:, None]
    replaced = (weights > 0) & ~is_target.any(dim=-1)
    probabilities = log_probabilities.exp() * (1 - weights)[:, None]
    probabilities[replaced, -1] = 0
    tokens = tokens.clone()
    tokens[replaced, -1] = targets[replaced]
    is_target[replaced, -1] = True
    probabilities += is_target * weights[:, None]
    return tokens, probabilities.clamp(min=SMALLEST).log()


def distillation_losses(logits: Tensor, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
    """KL(teacher || student) over the stored tokens and the rest as one outcome.

    logits (rows, vocabulary), tokens int64 and log_probabilities (rows, width).

    Returns:
        (rows,), in nats.
    """
    found: Tensor = _Distillation.apply(logits, tokens, log_probabilities)  # type: ignore[no-untyped-call]
    return found


class _Distillation(torch.autograd.Function):
    """The divergence and its gradient in closed form.

    With p the teacher, q = softmax(z) the student, K the stored tokens, p_R and q_R the mass of all others:

        loss = sum over j in K of p_j log(p_j / q_j) + p_R log(p_R / q_R)
        d loss / d z_j = s q_j - p_j for j in K, q_j (s - p_R / q_R) for the others

    s = sum of all p is 1 except for the rounding of the stored values.

    The gradient is computed with the loss and is the only saved tensor of the logits' size and dtype. Autograd would keep three
    float32 tensors, 0.2 GB each at 49,152 words and 1,024 positions. Here float32 values exist only for `CHUNK_BYTES` of
    positions at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, log_probabilities: Tensor) -> Tensor:
        gradient = torch.empty_like(logits)
        losses = [_differentiated(logits[part], tokens[part], log_probabilities[part], gradient[part]) for part in _parts(logits)]
        ctx.save_for_backward(gradient)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        found = torch.empty_like(gradient)
        for part in _parts(gradient):
            found[part] = gradient[part] * outer[0][part, None]
        return found, None, None


def _parts(logits: Tensor) -> list[slice]:
    """Slices of positions whose logits take `CHUNK_BYTES` in float32."""
    size = max(1, CHUNK_BYTES // (logits.shape[-1] * FLOAT32_BYTES))
    return [slice(start, start + size) for start in range(0, max(1, len(logits)), size)]


def _differentiated(logits: Tensor, tokens: Tensor, log_probabilities: Tensor, gradient: Tensor) -> Tensor:
    """Losses of some positions, (positions,); writes their gradient into `gradient`."""
    probabilities = log_probabilities.exp()
    teacher_rest = (1 - probabilities.sum(dim=-1)).clamp(min=SMALLEST_REST)
    total = (probabilities.sum(dim=-1) + teacher_rest)[:, None]
    student = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    kept = student.gather(-1, tokens)
    rest = student.scatter_(-1, tokens, 0.0).sum(dim=-1).clamp(min=SMALLEST)
    inside = (probabilities * (log_probabilities - kept.clamp(min=SMALLEST).log())).sum(dim=-1)
    student.mul_(total - (teacher_rest / rest)[:, None]).scatter_(-1, tokens, total * kept - probabilities)
    gradient.copy_(student)
    return inside + teacher_rest * (teacher_rest.log() - rest.log())
