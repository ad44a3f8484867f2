"""The evaluate stage: measure a model alone and against the one it was made from."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import calibration
from compresskit.checkpoint import source
from compresskit.checkpoint.manifest import check_unchanged
from compresskit.errors import RequestError
from compresskit.evaluation.gates import check_gates, parse_gate
from compresskit.evaluation.request import EvaluateOptions, EvaluateRequest, read_evaluation_text
from compresskit.evaluation.scores import Scores, collapse_warning
from compresskit.evaluation.start_token import first_token
from compresskit.evaluation.task_files import Task, read_tasks
from compresskit.machine.device import Where, choose_device
from compresskit.machine.memory import peak_memory_bytes
from compresskit.machine.progress import ProgressBars
from compresskit.models.load import open_any, open_model
from compresskit.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.evaluation.generations import Asked

BYTES_16BIT = 2


def evaluate(source_name: str, options: EvaluateOptions, quiet: bool = True) -> dict[str, Any]:
    """Measure scores, sizes and speed of a checkpoint.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, KL divergences in nats per token. It includes failed gates, which
        are not raised.

    Raises:
        CompresskitError: see errors.py for the kinds; invalid requests are refused before any work.
    """
    started = time.monotonic()
    gates = [parse_gate(text) for text in options.gate]
    against = source.resolve(options.against) if options.against else None
    model = open_any(source_name, options.trust_remote_code, options.adapter)
    request = EvaluateRequest(model, open_model(against, options.trust_remote_code) if against else None, options)
    request.check()
    if options.verify:
        _verify(request)
    tasks = _local_tasks(options)
    with ProgressBars(quiet) as bars:
        where = choose_device(options.device, options.dtype, model.checkpoint.dtypes, options.trust_remote_code)
        asked = _asked(request, where)
        scores, text, bits = _scores(request, where, bars)
        speed = _speed(request, where)
        answers = _answers(request, asked, where, bars)
        details = _task_scores(request, tasks, where, bars)
    report = _report(model, request.reference, scores, text)
    report |= {"bits_per_byte": bits, "speed": speed, "generations": answers, **_task_report(details)}
    results = check_gates(gates, report)
    report["gates"] = [result.model_dump() for result in results]
    return report | {
        "settings": options.model_dump(),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _verify(request: EvaluateRequest) -> None:
    """Raise CheckpointError for a weight file that is not what its manifest says; files without a manifest are not read."""
    for model in _models(request):
        check_unchanged(model.checkpoint)
        if model.adapter is not None:
            check_unchanged(model.adapter.store)


def _scores(request: EvaluateRequest, where: Where, bars: ProgressBars) -> tuple[Scores, str, float | None]:
    """The scores, what text they are of, and the bits of a byte of it."""
    import torch

    from compresskit.evaluation.language_modelling import cut_windows, score

    options, model = request.options, request.model
    text, description = read_evaluation_text(options.data)
    first = first_token(model.checkpoint.folder, options.bos, options.trust_remote_code)
    # The tokenizer's own ids: without a start token before each window, the text may still begin with something else.
    ids = calibration.encode(model.checkpoint.folder, text, first is None and options.bos == "auto", options.trust_remote_code)
    windows = cut_windows(torch.tensor(ids), options.sequence_length - (first is not None), options.windows)
    if first is not None:
        windows = torch.nn.functional.pad(windows, (1, 0), value=first)
    found = score(model, windows, where, request.reference, bars.of("scoring"))
    each = "" if first is None else f", each after the start token {first}"
    bits = _bits_per_byte(model, windows, found.perplexity, options.trust_remote_code)
    return found, f"{description}, {windows.shape[0]} windows of {windows.shape[1]} tokens{each}", bits


def _bits_per_byte(model: Model, windows: Tensor, perplexity: float, trust_remote_code: bool) -> float | None:
    """Spread the loss over bytes, which compares models of other tokens too.

    windows (windows, length) int64, of which each predicts all but its first.

    Returns:
        Bits a byte of the predicted tokens; None if they stand for no text.
    """
    from compresskit.models.tokenizer import open_tokenizer, tokenizing

    folder = model.checkpoint.folder
    tokenizer = open_tokenizer(folder, trust_remote_code)
    with tokenizing(folder):
        size = sum(len(tokenizer.decode(window[1:]).encode("utf-8", "replace")) for window in windows.tolist())
    return math.log2(perplexity) * windows[:, 1:].numel() / size if size else None


def _task_names(options: EvaluateOptions) -> list[str]:
    return [name.strip() for name in (options.tasks or "").split(",") if name.strip()]


def _local_tasks(options: EvaluateOptions) -> list[Task]:
    """Read the task files before any work; empty if lm-eval provides the tasks."""
    if not options.tasks_folder:
        if _task_names(options) and importlib.util.find_spec("lm_eval") is None:
            raise RequestError(
                f"--tasks {options.tasks}: takes lm-eval, pip install 'compresskit[tasks]'; or --tasks-folder DIR of .jsonl files"
            )
        return []
    folder = Path(options.tasks_folder).expanduser()
    names = _task_names(options) or sorted(path.stem for path in folder.glob("*.jsonl"))
    return read_tasks(folder, names, options.limit, options.few_shot, 0)


def _task_scores(
    request: EvaluateRequest, tasks: list[Task], where: Where, bars: ProgressBars
) -> dict[str, dict[str, float]] | None:
    options, model = request.options, request.model
    if not tasks and not _task_names(options):
        return None
    from compresskit.evaluation.tasks import lm_eval_scores, score_tasks

    if tasks:
        return score_tasks(model, tasks, where, bars.of("tasks"))
    from compresskit.models.ragged import load_stock
    from compresskit.models.tokenizer import open_tokenizer

    tokenizer = open_tokenizer(model.checkpoint.folder, options.trust_remote_code)
    return lm_eval_scores(load_stock(model, where), tokenizer, _task_names(options), options.limit, options.few_shot)


def _task_report(details: dict[str, dict[str, float]] | None) -> dict[str, Any]:
    """Task entries of the report: "tasks" has one score each, for gates and tables; "task_details" has all scores."""
    if details is None:
        return {"tasks": None, "task_details": None}
    from compresskit.evaluation.tasks import main_score

    return {"tasks": {name: main_score(scores) for name, scores in details.items()}, "task_details": details}


def _speed(request: EvaluateRequest, where: Where) -> dict[str, Any] | None:
    if not request.options.speed:
        return None
    from compresskit.evaluation.speed import speed

    return speed(request.model, where, request.reference).model_dump()


def _models(request: EvaluateRequest) -> list[Model]:
    return [request.model, *([request.reference] if request.reference else [])]


def _asked(request: EvaluateRequest, where: Where) -> Asked | None:
    """Make the questions ready, so that what cannot be asked is refused before the work."""
    if not request.options.generations:
        return None
    from compresskit.evaluation.generations import ask

    return ask(_models(request), request.options.generations, where)


def _answers(request: EvaluateRequest, asked: Asked | None, where: Where, bars: ProgressBars) -> list[dict[str, Any]] | None:
    if asked is None:
        return None
    from compresskit.evaluation.generations import generations

    return generations(_models(request), asked, where, bars.of("answering"))


def _report(model: Model, reference: Model | None, scores: Scores, text: str) -> dict[str, Any]:
    sizes: dict[str, Any] = {"size_ratio": None, "size_ratio_16bit": None, "reference_bytes": None, "reference_parameters": None}
    if reference is not None:
        sizes = {
            "size_ratio": model.bytes / reference.bytes,
            "size_ratio_16bit": model.bytes / (BYTES_16BIT * reference.parameters),
            "reference_bytes": reference.bytes,
            "reference_parameters": reference.parameters,
        }
    return {
        "stage": "evaluate",
        "source": str(model.checkpoint.folder),
        "against": str(reference.checkpoint.folder) if reference else None,
        "text": text,
        **scores.model_dump(),
        "adapter": str(model.adapter.folder) if model.adapter else None,
        "parameters": model.parameters,
        "bytes": model.bytes,
        "bits_per_weight": model.bits_per_weight,
        **sizes,
        "warning": collapse_warning(scores),
    }
