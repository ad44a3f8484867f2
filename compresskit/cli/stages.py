"""The stage commands, built from methods and options, and inspect."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit import distributed
from compresskit.cli.flags import (
    OUTPUT_PARAMETERS,
    SOURCE_HELP,
    Json,
    Verbose,
    build,
    interruptible,
    options_of,
    places,
    with_parameters,
)
from compresskit.cli.push import PUSH_PARAMETERS, asked_upload, uploaded
from compresskit.cli.streams import log, show
from compresskit.cli.summaries import summary
from compresskit.errors import GateError
from compresskit.methods import METHODS, STAGES, method_class, options_class, runner, stage_of

if TYPE_CHECKING:
    from pydantic import BaseModel


def add_stages(app: typer.Typer, wanted: Sequence[str]) -> None:
    """Add a command group for every stage. Only the `wanted` command and method, or all if none, get their flags."""
    first, second = wanted[:2] or ("", "")
    for stage, entries in METHODS.items():
        group = typer.Typer(help=STAGES[stage].summary, no_args_is_help=True, rich_markup_mode=None)
        group.callback()(_nothing)
        for name, entry in entries.items() if first in (stage, "") else ():
            command = stage_command(stage, name) if second in (name, "") else _nothing
            group.command(name, help=f"{entry.summary} {entry.paper}".strip())(command)
        if stage == "merge":
            group.command("similarity")(similarity)
        app.add_typer(group, name=stage)
    app.command("evaluate", help=STAGES["evaluate"].summary)(evaluate_command() if first in ("evaluate", "") else _nothing)
    _add_single(app, "search", first)
    app.command("inspect")(inspect_source)
    for name in ("pack", "expand"):
        _add_single(app, name, first)
    app.command("methods")(methods)


def _add_single(app: typer.Typer, stage: str, first: str) -> None:
    """Add the command of a stage without methods; only the `first` argument's, or all if "", get their flags."""
    app.command(stage, help=STAGES[stage].summary)(single_command(stage) if first in (stage, "") else _nothing)


def _nothing() -> None:
    """A command that is listed and not called."""


def stage_command(stage: str, name: str) -> Callable[..., None]:
    """Build the command SOURCE OUT with flags for the method's fields and the stage's options."""
    method_type, options_type = method_class(stage, name), options_class(stage, name)
    several = stage_of(stage, name).several

    def command(out: Path, **values: Any) -> None:
        source, quiet = values["sources" if several else "source"], values["quiet"]
        if distributed.is_restarted() and "resume" in options_type.model_fields:
            values["resume"] = True
        method, options = build(method_type, values), build(options_type, values)
        upload = asked_upload(values)
        with interruptible(_resumable(options_type)):
            result = runner(stage, name)(method, source, out, options, quiet=quiet)
        _log_result(result, quiet)
        for sample in result.get("shown", ()):
            log("--- {file} row {row}, before the response:\n{before}\n--- the response:\n{response}".format_map(sample), quiet)
        if values["verbose"] and "time_shares" in result:
            log("; ".join(f"{what} {seconds:.1f} s" for what, seconds in result["time_shares"].items()))
        _show_result(uploaded(upload, out, result, quiet), values["json_output"])

    out_kind, pushed = _out_of(stage, name)
    parameters = [*places(several, out_kind), *options_of(method_type), *options_of(options_type), *pushed, *OUTPUT_PARAMETERS]
    return with_parameters(command, parameters)


def single_command(stage: str) -> Callable[..., None]:
    """Build SOURCE OUT of a stage without methods, with flags for its options."""
    options_type = options_class(stage, "")

    def command(source: str, out: Path, **values: Any) -> None:
        options, upload, quiet = build(options_type, values), asked_upload(values), values["quiet"]
        with interruptible(_resumable(options_type)):
            result = runner(stage, "")(source, out, options, quiet=quiet)
        _log_result(result, quiet)
        _show_result(uploaded(upload, out, result, quiet), values["json_output"])

    out_kind, pushed = _out_of(stage, "")
    return with_parameters(command, [*places(False, out_kind), *options_of(options_type), *pushed, *OUTPUT_PARAMETERS])


def _resumable(options_type: type[BaseModel]) -> str:
    """What to say of an interrupted command; "" where it begins anew."""
    return "the same command with --resume goes on" if "resume" in options_type.model_fields else ""


def _out_of(stage: str, name: str) -> tuple[str, Sequence[inspect.Parameter]]:
    """(whether OUT is a file or a folder, the flags that upload it)."""
    return ("file", ()) if stage_of(stage, name).gives == "file" else ("folder", PUSH_PARAMETERS)


def _log_result(result: dict[str, Any], quiet: bool) -> None:
    log(result.get("note") or summary(result), quiet)
    for note in result.get("notes", ()):
        log(f"compresskit: note: {note}", quiet)


def _show_result(result: dict[str, Any], as_json: bool) -> None:
    """Print a result, or its place; raises GateError for what it warns of."""
    show(json.dumps(result) if as_json else result["output"])
    if result.get("warning"):
        raise GateError(result["warning"])


def evaluate_command() -> Callable[..., None]:
    """Build `evaluate SOURCE` with flags for its options."""
    from compresskit.evaluation.request import EvaluateOptions
    from compresskit.evaluation.run import evaluate
    from compresskit.evaluation.table import answers, table

    def command(source: str, **values: Any) -> None:
        quiet: bool = values["quiet"]
        report = evaluate(source, build(EvaluateOptions, values), quiet=quiet)
        show(json.dumps(report) if values["json_output"] else f"{table(report)}\n\n{answers(report)}".strip())
        if report["warning"]:
            log(f"compresskit: warning: {report['warning']}")
        missed = [gate for gate in report["gates"] if not gate["passed"]]
        if missed:
            raise GateError("; ".join(str(GateResult(**gate)) for gate in missed))

    from compresskit.evaluation.gates import GateResult

    positional = inspect.Parameter(
        "source", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[str, typer.Argument(help=SOURCE_HELP)]
    )
    return with_parameters(command, [positional, *options_of(EvaluateOptions), *OUTPUT_PARAMETERS])


def inspect_source(
    source: Annotated[
        str, typer.Argument(help="A checkpoint or adapter folder, a .ckz file, a Hub id, or - for standard input.")
    ],
    json_output: Json = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Accept a checkpoint that ships code.")] = False,
    structure: Annotated[bool, typer.Option(help="Show what was derived of its blocks, and what no stage edits.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show the contents of a checkpoint or adapter: family, widths, bits, bytes and provenance."""
    from compresskit.report.inspect import inspect as look
    from compresskit.report.inspect import listing

    found = look(source, trust_remote_code, structure)
    show(json.dumps(found) if json_output else listing(found))


def methods(json_output: Json = False) -> None:
    """List the methods of every stage with their papers."""
    if json_output:
        table = {stage: {n: {"paper": e.paper, "summary": e.summary} for n, e in m.items()} for stage, m in METHODS.items()}
        show(json.dumps(table))
        return
    for stage, entries in METHODS.items():
        for name, entry in entries.items():
            show(f"{stage:10} {name:12} {entry.paper or '-':18} {entry.summary}")


def similarity(
    sources: Annotated[list[str], typer.Argument(help="Adapters (ternary or not), or checkpoints with --base.")],
    base: Annotated[str | None, typer.Option(help="Checkpoint from which the sources were fine-tuned.")] = None,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the cosine similarity between task vectors without merging them."""
    from compresskit.task_vectors.similarity import listing
    from compresskit.task_vectors.similarity import similarity as measure

    found = measure(sources, base)
    show(json.dumps(found) if json_output else listing(found))
