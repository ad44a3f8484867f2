"""The evaluate stage: what a model is worth, alone and against the one it was made from."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compresskit import calibration, source
from compresskit.errors import RequestError
from compresskit.evaluate.gates import check_gates, parse_gate
from compresskit.evaluate.scores import Scores, check_comparable, check_context, collapse_warning
from compresskit.evaluate.task_files import Task, read_tasks
from compresskit.memory import peak_memory_bytes
from compresskit.model import Model
from compresskit.opening import open_any, open_model
from compresskit.pipeline.device import choose_device
from compresskit.pipeline.inspection import bits_per_weight
from compresskit.progress import ProgressBars

BYTES_16BIT = 2


class EvaluateOptions(BaseModel):
    """What to measure, on which text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    against: str | None = None
    """The model to compare with: a folder, a Hub id, or demo:smollm2-135m."""
    adapter: str | None = None
    """A PEFT LoRA adapter to add to the model; left out, the one that SOURCE keeps in its folder adapter; none for no adapter."""
    data: str = "builtin"
    """Text: FILE.txt, .jsonl or .parquet, hub:DATASET, or builtin, prose that calibration never takes."""
    windows: Annotated[int, Field(ge=1)] = 20
    """Windows of text to score, from the start of the text."""
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens in a window."""
    speed: bool = False
    """Measure prefill and decode tokens per second and peak memory; loads the models whole."""
    tasks: str | None = None
    """Tasks to score, such as arc_easy,lambada: files of --tasks-folder, else tasks of lm-eval."""
    tasks_folder: str | None = None
    """Folder of NAME.jsonl files: question, choices, answer; or text, whose last word is to be predicted."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Score only so many rows of each task."""
    few_shot: Annotated[int, Field(ge=0)] = 0
    """Solved rows of the same task before each question."""
    gate: tuple[str, ...] = ()
    """A limit such as 'perplexity_ratio<=1.2'; may be repeated. Exit code 3 where one is not met."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the accelerator where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto is float32 on the CPU, the checkpoint's own elsewhere."""
    trust_remote_code: bool = False
    """Run the code that a checkpoint brings."""


def evaluate(source_name: str, options: EvaluateOptions, quiet: bool = True) -> dict[str, Any]:
    """Measure scores, sizes and speed of a checkpoint.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, KL divergences in nats a token. Gates that are not met are in
        it, not raised.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong, before any work where the request cannot be served.
    """
    started = time.monotonic()
    gates = [parse_gate(text) for text in options.gate]
    against = source.resolve(options.against) if options.against else None
    model = open_any(source_name, options.trust_remote_code, options.adapter)
    reference = open_model(against, options.trust_remote_code) if against else None
    _check(model, reference, options)
    tasks = _local_tasks(options)
    with ProgressBars(quiet) as bars:
        scores, text = _scores(model, reference, options, bars)
        speed = _speed(model, reference, options)
        details = _task_scores(model, tasks, options, bars)
    report = _report(model, reference, scores, text) | {"speed": speed, **_task_report(details)}
    results = check_gates(gates, report)
    report["gates"] = [result.model_dump() for result in results]
    return report | {
        "settings": options.model_dump(),
        "seconds": round(time.monotonic() - started, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _check(model: Model, reference: Model | None, options: EvaluateOptions) -> None:
    for each in (model, reference) if reference else (model,):
        check_context(each, options.sequence_length)
    if reference is not None:
        check_comparable(model, reference)
    check_evaluation_text("--data", options.data, options.sequence_length)


def check_evaluation_text(flag: str, data: str, sequence_length: int) -> None:
    """Refuse, before any work, text that cannot judge a model.

    Raises:
        RequestError: it would be sampled from the model itself.
        CalibrationError: unknown kind, unusable file, a missing package, certainly too little text.
    """
    parts = calibration.parse(data)
    if any(isinstance(part, calibration.SelfSource) for part in parts):
        raise RequestError(f"{flag} {data}: a model's own text cannot judge it; give a file, hub:DATASET or builtin")
    calibration.check(data, len(parts), sequence_length)


def read_evaluation_text(data: str) -> tuple[str, str]:
    """(text, sentence about what it is); `builtin` is the part that calibration never takes."""
    parts = [calibration.read_text(each, purpose="evaluation") for each in calibration.parse(data)]  # type: ignore[arg-type]
    return "\n\n".join(part.text for part in parts), " + ".join(part.description for part in parts)


def _scores(model: Model, reference: Model | None, options: EvaluateOptions, bars: ProgressBars) -> tuple[Scores, str]:
    import torch

    from compresskit.evaluate.language_modelling import cut_windows, score

    text, description = read_evaluation_text(options.data)
    device, dtype = choose_device(options.device, options.dtype, model)
    ids = calibration.encode(model.checkpoint.folder, text, True, options.trust_remote_code)
    windows = cut_windows(torch.tensor(ids), options.sequence_length, options.windows)
    found = score(model, windows, device, dtype, reference, lambda done, total: bars("scoring", done, total))
    return found, f"{description}, {windows.shape[0]} windows of {windows.shape[1]} tokens"


def _task_names(options: EvaluateOptions) -> list[str]:
    return [name.strip() for name in (options.tasks or "").split(",") if name.strip()]


def _local_tasks(options: EvaluateOptions) -> list[Task]:
    """The task files, read before any work; nothing where lm-eval brings the tasks."""
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
    model: Model, tasks: list[Task], options: EvaluateOptions, bars: ProgressBars
) -> dict[str, dict[str, float]] | None:
    if not tasks and not _task_names(options):
        return None
    from compresskit.evaluate.tasks import lm_eval_scores, score_tasks

    device, dtype = choose_device(options.device, options.dtype, model)
    if tasks:
        return score_tasks(model, tasks, (device, dtype), lambda done, total: bars("tasks", done, total))
    from transformers import AutoTokenizer

    from compresskit.ragged import load_stock

    folder = model.checkpoint.folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    network = load_stock(model, dtype, options.trust_remote_code).to(device)
    return lm_eval_scores(network, tokenizer, _task_names(options), options.limit, options.few_shot)


def _task_report(details: dict[str, dict[str, float]] | None) -> dict[str, Any]:
    """What the report says of tasks: in "tasks" one figure each, for gates and tables, in "task_details" all of them."""
    if details is None:
        return {"tasks": None, "task_details": None}
    from compresskit.evaluate.tasks import main_score

    return {"tasks": {name: main_score(scores) for name, scores in details.items()}, "task_details": details}


def _speed(model: Model, reference: Model | None, options: EvaluateOptions) -> dict[str, Any] | None:
    if not options.speed:
        return None
    from compresskit.evaluate.speed import speed

    device, dtype = choose_device(options.device, options.dtype, model)
    found = speed(model, device, dtype, reference, options.trust_remote_code)
    return found.model_dump()


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
        "bits_per_weight": bits_per_weight(model),
        **sizes,
        "warning": collapse_warning(scores),
    }
