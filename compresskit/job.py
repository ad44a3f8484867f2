"""Shared run of the stages that write a model: checked request, device, calibration text, resumable output.

A stage's `request.py` makes a `Request` and answers what the stage will write and need; its `run.py` does the work through
a `Job`. torch is imported when the work begins, not before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from compresskit import calibration, distributed
from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint.digests import beside
from compresskit.checkpoint.folder import held
from compresskit.checkpoint.manifest import changed_files, damage_named, fingerprint, finished_result, manifest, verified_hashes
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.side_files import side_files
from compresskit.checkpoint.work_folder import WorkFolder, check_out, check_space, read_progress
from compresskit.checkpoint.writer import Writer
from compresskit.errors import RequestError
from compresskit.machine.device import Where, choose_device
from compresskit.machine.progress import ProgressBars
from compresskit.methods import name_of
from compresskit.models.load import open_any
from compresskit.models.model import Model
from compresskit.stages import Method, Options, parse_bytes
from compresskit.walk.cost import scratch_bytes

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
    def stores(self) -> list[Checkpoint]:
        """The opened folders whose weights determine the result."""
        return [self.model.checkpoint]

    @property
    def sampling_passes(self) -> float:
        """Forward passes for sampling the text; the cache may hold it already."""
        return PASSES_SAMPLING * self.options.samples if self.options.calibration == "self" else 0.0

    @property
    def scratch_bytes(self) -> int:
        """Room on disk, during the work alone, for hidden states that would take too much memory."""
        text = self.text if self.options.device in ("auto", "cpu") else None
        return scratch_bytes(self.model, text.samples * text.sequence_length) if text else 0

    def settings(self, where: Where) -> dict[str, Any]:
        """Settings that determine the weights, besides the models and the text."""
        shared = self.options.model_dump(include=set(TEXT_SETTINGS))
        return {"method": self.name, **self.method.model_dump(), **shared, **where_used(where)}

    def check_text_and_out(self, needed_bytes: int) -> None:
        """Refuse an unusable text, shard size, OUT or file beside the weights; `needed_bytes`: room for the result."""
        parse_bytes(self.options.max_shard_size)
        if self.text is not None:
            calibration.check_request(self.text, self.text_model)
        options = self.options
        if distributed.is_first():
            check_out(self.out, self.model.checkpoint.folder, options.overwrite, options.resume)
            check_space(self.out, needed_bytes + self.scratch_bytes)
        if self.outputs().config is not None:
            side_files(self.model.checkpoint.folder)


R = TypeVar("R", bound=Request)


def where_used(where: Where) -> dict[str, str]:
    """Device and dtype as the manifest names them."""
    return {"dtype": str(where.dtype).removeprefix("torch."), "device": where.device.type}


@dataclass(frozen=True)
class Job:
    """A running request."""

    request: Request
    work: WorkFolder
    where: Where
    tokens: Tensor
    """Calibration windows (samples, sequence_length) int64; none where no text is needed."""
    images: Mapping[bytes, dict[str, Tensor]]
    """What the windows with images add to their tokens, by the bytes of these."""
    text: dict[str, str | None]
    """What text they are, for the manifest."""
    settings: dict[str, Any]
    progress: dict[str, Any] | None
    """Progress of an interrupted run, None if there is none."""
    bars: ProgressBars

    @cached_property
    def key(self) -> str:
        """`_key` of this request; the first use waits for the hashes of the weight files."""
        return _key(self.request, self.settings, self.text)

    def writer(self, outputs: Outputs, facts: dict[str, Any]) -> Writer:
        """The writer for these outputs, new with these facts for the manifest, or resumed: its `done` lists finished blocks."""
        folder = self.request.model.checkpoint.folder
        writer = Writer(self.work, outputs, self.request.options.shard_bytes, lambda: self.key)
        if self.progress:
            writer.resume(folder, self.progress)
        else:
            if distributed.is_first():
                check_space(self.work.out, sum(spec.bytes for spec in outputs.specs))
            writer.start(folder)
            writer.facts |= facts
        return writer

    def commit(self, writer: Writer, facts: dict[str, Any]) -> None:
        """Write the manifest and give OUT its final name."""
        request = self.request
        found = writer.facts | facts | self.text
        made: dict[str, Any] = {}
        if distributed.is_first():
            made = manifest(request.stage, self.settings, request.model.checkpoint, writer.hashes(), found)
        writer.commit(made)

    def result(self, before: tuple[int, int], after: tuple[int, int]) -> dict[str, Any]:
        """What `--json` prints of every such stage; `before`, `after`: parameters and bytes of what was read and written."""
        return stage_result(self.request.stage, self.settings, self.request.out, self.request.model.checkpoint, before, after)


def run_request(open_request: Callable[[], R], work: Callable[[R, Job], dict[str, Any]], quiet: bool) -> dict[str, Any]:
    """Open and check a request, run its work, and add time and memory to the result; `quiet` draws no progress bar.

    Returns:
        The result; with `resume`, also of a request that had finished already.
    """
    started = time.monotonic()
    request = distributed.after_first(open_request)
    options = request.options
    hashed = [(each.digests, each.files) for each in request.stores] if distributed.is_first() else []
    with held(request.out, options.overwrite, options.resume) as folder, ProgressBars(quiet) as bars, beside(hashed):
        job = begin(request, folder, bars)
        is_there = options.resume and os.path.lexists(request.out)
        finished = distributed.from_first(lambda: finished_request(request, job.key) if is_there else None)
        with damage_named(lambda: job.key if distributed.is_first() else None):
            result = finished or work(request, job)
    return result | time_and_memory(started)


def begin(request: Request, work: WorkFolder, bars: ProgressBars) -> Job:
    """Choose the device, read the text and look for an interrupted run.

    Returns:
        The running request; nothing is written yet.

    Raises:
        CheckpointError: a weight file is not what its manifest says; without an interrupted run, the job's key finds that out.
        RequestError: there is no such device, or another request's unfinished output is in the way.
        CalibrationError: the text is unusable or too short.
    """
    options = request.options
    where = choose_device(options.device, options.dtype, request.model.checkpoint.dtypes, options.trust_remote_code)
    where = where._replace(scratch=work.path / "scratch")
    settings = request.settings(where)
    found = distributed.from_first(lambda: _found(request, settings, work, where, bars))
    return Job(request, work, where, settings=settings, bars=bars, **found)


def _found(request: Request, settings: dict[str, Any], work: WorkFolder, where: Where, bars: ProgressBars) -> dict[str, Any]:
    """The text and the progress. Of several ranks the first finds them for all."""
    tokens, images, text = _text(request, where, bars)
    is_begun = request.options.resume and work.progress.is_file()
    progress = read_progress(work, _key(request, settings, text)) if is_begun else None
    return {"tokens": tokens, "images": images, "text": text, "progress": progress}


def _key(request: Request, settings: dict[str, Any], text: Mapping[str, str | None]) -> str:
    """Fingerprint of everything that determines the result; an interrupted run is resumed only with the same key."""
    hashes = verified_hashes(request.stores, request.options.verify)
    return fingerprint(request.stage, settings, request.options.shard_bytes, *hashes, text["calibration_digest"])


def _text(
    request: Request, where: Where, bars: ProgressBars
) -> tuple[Tensor, Mapping[bytes, dict[str, Tensor]], dict[str, str | None]]:
    import torch

    if request.text is None:
        nothing = torch.zeros(0, request.options.sequence_length, dtype=torch.int64)
        return nothing, {}, {"calibration_text": None, "calibration_digest": None}
    found = calibration.calibrate(request.text, request.text_model, where, bars.of("sampling text"))
    return found.tokens, found.images, {"calibration_text": found.description, "calibration_digest": found.digest}


def finished_request(request: Request, key: str) -> dict[str, Any] | None:
    """Look for the result of a request that `--resume` finds finished in OUT.

    Returns:
        What is known of it, None if there is none, or if its files have changed and it is to be replaced.

    Raises:
        RequestError: OUT is the result of another request, and is not to be replaced.
    """
    out, options = request.out, request.options
    if not options.resume or not os.path.lexists(out):
        return None
    recorded = read_manifest(out) or {}
    if options.overwrite and (recorded.get("request") != key or changed_files(out, recorded)):
        return None
    if recorded.get("request") != key:
        raise RequestError(f"{out}: exists already, made by another request; choose another folder, or pass --overwrite")
    found, before = finished_result(out), (request.model.parameters, request.model.bytes)
    # A selection holds no weights.
    after = (open_any(str(out), options.trust_remote_code).parameters, size) if (size := found["bytes_after"]) else before
    known = stage_result(request.stage, found["settings"], out, request.model.checkpoint, before, after)
    return known | found | {"note": f"{out}: had finished already"}
