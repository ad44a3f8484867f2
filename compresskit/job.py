"""Shared run of the stages that write a model: checked request, device, calibration text, resumable output.

A stage's `request.py` makes a `Request` and answers what the stage will write and need; its `run.py` does the work through
a `Job`. torch is imported when the work begins, not before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compresskit import calibration
from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint.manifest import fingerprint, manifest
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.writer import Writer, check_out, read_progress
from compresskit.machine.device import Where, choose_device
from compresskit.machine.memory import peak_memory_bytes
from compresskit.machine.progress import ProgressBars
from compresskit.methods import name_of
from compresskit.models.model import Model
from compresskit.stages import Method, Options, parse_bytes

if TYPE_CHECKING:
    from torch import Tensor

HELD_BACK = 4
"""Held-back calibration windows for the stage's final KL divergence; no method sees them."""
PASSES_SAMPLING = 2.0
"""Sampling `self` takes about as long as two forward passes over as many tokens."""
TEXT_SETTINGS = frozenset({"calibration", "samples", "sequence_length", "seed"})
"""Options that decide the weights."""


@dataclass(frozen=True)
class Request:
    """A request to a stage. Each stage subclasses it and states what it writes and needs."""

    method: Method
    model: Model
    """SOURCE."""
    out: Path
    options: Options

    stage: ClassVar[str] = ""
    fixed_seconds: ClassVar[float] = 5.0
    """Fixed seconds of a run: imports, hashes, files."""
    left_bytes: ClassVar[int] = 0
    """Memory in bytes that stays allocated for later steps."""

    def check(self) -> None:
        """Refuse what the stage cannot do with this model; looks at shapes only."""
        raise TypeError(f"{type(self).__name__} defines no check")

    def outputs(self) -> Outputs:
        """Every file of the result, as far as it is known before the work."""
        raise TypeError(f"{type(self).__name__} defines no outputs")

    def result_model(self) -> Model:
        """The model that comes out, with shapes and no weights."""
        raise TypeError(f"{type(self).__name__} defines no result_model")

    def passes(self) -> float:
        """Number of forward passes of one window through all blocks."""
        raise TypeError(f"{type(self).__name__} defines no passes")

    def peak_bytes(self) -> int:
        """Peak bytes, in addition to the process as it is."""
        raise TypeError(f"{type(self).__name__} defines no peak_bytes")

    @property
    def name(self) -> str:
        """The method's name in the table."""
        return name_of(self.stage, self.method)

    @property
    def text(self) -> TextRequest | None:
        """Calibration text, None if not needed."""
        return None

    @property
    def text_model(self) -> Model:
        """The model whose tokenizer reads the text, and that samples `self`."""
        return self.model

    @property
    def inputs(self) -> list[dict[str, str]]:
        """SHA-256 of the weight files that determine the result, per model."""
        return [self.model.checkpoint.hashes]

    @property
    def sampling_passes(self) -> float:
        """Forward passes for sampling the text; the cache may hold it already."""
        return PASSES_SAMPLING * self.options.samples if self.options.calibration == "self" else 0.0

    def settings(self, where: Where) -> dict[str, Any]:
        """Settings that determine the weights, besides the models and the text."""
        shared = self.options.model_dump(include=set(TEXT_SETTINGS))
        return {"method": self.name, **self.method.model_dump(), **shared, **where_used(where)}

    def check_text_and_out(self, needed_bytes: int) -> None:
        """Refuse an unusable calibration text, shard size or OUT; `needed_bytes`: room for the result."""
        parse_bytes(self.options.max_shard_size)
        if self.text is not None:
            calibration.check(self.text.spec, self.text.samples, self.text.sequence_length)
        check_out(self.out, self.model.checkpoint.folder, needed_bytes, self.options.overwrite)


R = TypeVar("R", bound=Request)


def where_used(where: Where) -> dict[str, str]:
    """Device and dtype as the manifest names them."""
    return {"dtype": str(where.dtype).removeprefix("torch."), "device": where.device.type}


@dataclass(frozen=True)
class Job:
    """A running request."""

    request: Request
    where: Where
    tokens: Tensor
    """Calibration windows (samples, sequence_length) int64; none where no text is needed."""
    text: dict[str, str | None]
    """What text they are, for the manifest."""
    settings: dict[str, Any]
    key: str
    """Fingerprint of everything that determines the result; an interrupted run is resumed only with the same key."""
    progress: dict[str, Any] | None
    """Progress of an interrupted run, None if there is none."""
    bars: ProgressBars

    @contextmanager
    def writer(self, outputs: Outputs, facts: dict[str, Any]) -> Iterator[Writer]:
        """Open the writer for these outputs, new with these facts for the manifest, or resumed.

        Yields:
            The writer; its `done` lists the blocks that are on the disk already.
        """
        request, folder = self.request, self.request.model.checkpoint.folder
        with Writer(request.out, outputs, request.options.shard_bytes, self.key) as writer:
            if self.progress:
                writer.resume(self.progress)
            else:
                check_out(request.out, folder, sum(spec.bytes for spec in outputs.specs), request.options.overwrite)
                writer.start(folder)
                writer.facts |= facts
            yield writer

    def commit(self, writer: Writer, facts: dict[str, Any]) -> None:
        """Write the manifest and give OUT its final name."""
        request = self.request
        found = writer.facts | facts | self.text
        writer.commit(manifest(request.stage, self.settings, request.model.checkpoint, writer.hashes(), found))

    def result(self, before: tuple[int, int], after: tuple[int, int]) -> dict[str, Any]:
        """What `--json` prints of every such stage; `before`, `after`: parameters and bytes of what was read and written."""
        return stage_result(self.request.stage, self.settings, self.request.out, self.request.model.checkpoint, before, after)


def run_request(open_request: Callable[[], R], work: Callable[[R, Job], dict[str, Any]], quiet: bool) -> dict[str, Any]:
    """Open and check a request, run its work, and add time and memory to the result; `quiet` draws no progress bar."""
    started = time.monotonic()
    request = open_request()
    with ProgressBars(quiet) as bars:
        result = work(request, begin(request, bars))
    return result | time_and_memory(started)


def begin(request: Request, bars: ProgressBars) -> Job:
    """Choose the device, read the text and look for an interrupted run.

    Returns:
        The running request; nothing is written yet.

    Raises:
        RequestError: there is no such device, or another request's unfinished output is in the way.
        CalibrationError: the text is unusable or too short.
    """
    options = request.options
    stored = request.model.checkpoint.dtypes
    where = choose_device(options.device, options.dtype, stored, options.trust_remote_code)
    tokens, text = _text(request, where, bars)
    settings = request.settings(where)
    key = fingerprint(request.stage, settings, options.shard_bytes, *request.inputs, text["calibration_digest"])
    progress = read_progress(request.out, key) if options.resume else None
    return Job(request, where, tokens, text, settings, key, progress, bars)


def _text(request: Request, where: Where, bars: ProgressBars) -> tuple[Tensor, dict[str, str | None]]:
    import torch

    if request.text is None:
        nothing = torch.zeros(0, request.options.sequence_length, dtype=torch.int64)
        return nothing, {"calibration_text": None, "calibration_digest": None}
    found = calibration.calibrate(request.text, request.text_model, where, bars.of("sampling text"))
    return found.tokens, {"calibration_text": found.description, "calibration_digest": found.digest}


def stage_result(
    stage: str,
    settings: dict[str, Any],
    out: Path,
    source: Checkpoint | list[Path],
    before: tuple[int, int],
    after: tuple[int, int],
) -> dict[str, Any]:
    """Describe what a stage read and wrote.

    `settings`: with the name of the method. `source`: what was read, or the folders that were merged. `before`, `after`: the
    parameters and the bytes of what was read and of what was written.

    Returns:
        The keys that `--json` prints for every such stage; stages add their own.
    """
    return {
        "stage": stage,
        "method": settings["method"],
        "output": str(out),
        "source": [str(each) for each in source] if isinstance(source, list) else str(source.folder),
        "parameters_before": before[0],
        "parameters_after": after[0],
        "bytes_before": before[1],
        "bytes_after": after[1],
        "settings": settings,
    }


def time_and_memory(started: float) -> dict[str, Any]:
    """The keys that close every result; `started`: of time.monotonic()."""
    return {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}
