"""The stage commands, built from methods and options, and inspect."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

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
    found = search_command() if first in ("search", "") else _nothing
    app.command("search", help=STAGES["search"].summary)(found)
    app.command("inspect")(inspect_source)
    for name, out_kind in (("pack", "file"), ("expand", "folder")):
        single = single_command(name, out_kind) if first in (name, "") else _nothing
        app.command(name, help=STAGES[name].summary)(single)
    app.command("methods")(methods)


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
        with interruptible("the same command with --resume goes on" if "resume" in options_type.model_fields else ""):
            result = runner(stage, name)(method, source, out, options, quiet=quiet)
        log(result.get("note") or summary(result), quiet)
        for note in result.get("notes", ()):
            log(f"compresskit: note: {note}", quiet)
        for sample in result.get("shown", ()):
            log("--- {file} row {row}, before the response:\n{before}\n--- the response:\n{response}".format_map(sample), quiet)
        if values["verbose"] and "time_shares" in result:
            log("; ".join(f"{what} {seconds:.1f} s" for what, seconds in result["time_shares"].items()))
        result = uploaded(upload, out, result, quiet)
        show(json.dumps(result) if values["json_output"] else result["output"])
        if result.get("warning"):
            raise GateError(result["warning"])

    out_kind = "file" if stage_of(stage, name).gives == "file" else "folder"
    pushed = PUSH_PARAMETERS if out_kind == "folder" else ()
    parameters = [*places(several, out_kind), *options_of(method_type), *options_of(options_type), *pushed, *OUTPUT_PARAMETERS]
    return with_parameters(command, parameters)


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


def single_command(stage: str, out_kind: str) -> Callable[..., None]:
    """Build SOURCE OUT of a stage without methods, with flags for its options; OUT is a folder or a file."""
    options_type = options_class(stage, "")

    def command(source: str, out: Path, **values: Any) -> None:
        options, upload = build(options_type, values), asked_upload(values)
        result = runner(stage, "")(source, out, options, quiet=values["quiet"])
        log(summary(result), values["quiet"])
        result = uploaded(upload, out, result, values["quiet"])
        show(json.dumps(result) if values["json_output"] else result["output"])

    pushed = PUSH_PARAMETERS if out_kind == "folder" else ()
    return with_parameters(command, [*places(False, out_kind), *options_of(options_type), *pushed, *OUTPUT_PARAMETERS])


def search_command() -> Callable[..., None]:
    """Build `search SOURCE OUT` with flags for its options."""
    from compresskit.searching.options import SearchOptions
    from compresskit.searching.run import search

    def command(source: str, out: Path, **values: Any) -> None:
        options, quiet, upload = build(SearchOptions, values), values["quiet"], asked_upload(values)
        with interruptible("the same command with --resume goes on"):
            result = search(source, out, options, quiet=quiet)
        log(result.get("note") or summary(result), quiet)
        for note in result.get("notes", ()):
            log(f"compresskit: note: {note}", quiet)
        result = uploaded(upload, out, result, quiet)
        show(json.dumps(result) if values["json_output"] else result["output"])
        if result.get("warning"):
            raise GateError(result["warning"])

    return with_parameters(command, [*places(), *options_of(SearchOptions), *PUSH_PARAMETERS, *OUTPUT_PARAMETERS])


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
