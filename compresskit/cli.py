"""The command line: parse flags into a typed method and options, call the stage, print the result.

Standard output carries the result alone; everything else goes to standard error. Loads no torch.
"""

from __future__ import annotations

import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

import compresskit
from compresskit.errors import CompresskitError, GateError, Interrupted, RequestError
from compresskit.methods import METHODS, STAGES, method_class, options_class, runner, stage_of
from compresskit.recipe_commands import add_recipe_commands

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

app = typer.Typer(
    name="compresskit",
    help="Make Hugging Face language models smaller: prune, quantize, then see what it cost.",
    add_completion=True,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the output's path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Errors only on standard error.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Details and tracebacks on standard error.")]
OUTPUT_PARAMETERS = (
    inspect.Parameter("json_output", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose),
)


def version(value: bool) -> None:
    """Print the version and stop, where asked for."""
    if value:
        typer.echo(compresskit.__version__)
        raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Make Hugging Face language models smaller: prune, quantize, then see what it cost."""


def log(message: str, quiet: bool = False) -> None:
    """One line on standard error."""
    if not quiet:
        typer.echo(message, err=True)


def flag(name: str) -> str:
    """The spelling of a field on the command line."""
    return "--" + name.replace("_", "-")


def option(name: str, info: FieldInfo, annotation: Any) -> inspect.Parameter:
    """A command-line option for a field: its name, its type, its default, its documentation."""
    if get_origin(annotation) is tuple:
        several: Any = Annotated[list[str], typer.Option(flag(name), help=info.description)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=[], annotation=several)
    annotation = bool if annotation == bool | None else annotation
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    off = extra.get("off", f"--no-{flag(name)[2:]}")
    spelling = f"{flag(name)}/{off}" if annotation is bool else flag(name)
    typed: Any = Annotated[_plain_type(annotation), typer.Option(spelling, help=info.description)]
    default = inspect.Parameter.empty if info.is_required() else info.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=typed)


def _plain_type(annotation: Any) -> Any:
    """Choices and bounds are checked by the typed configuration, which says more than the parser can."""
    if get_origin(annotation) is UnionType:
        return str | None
    return annotation if annotation in (int, float, bool) else str


def options_of(model: type[BaseModel]) -> list[inspect.Parameter]:
    """An option for every field."""
    hints = get_type_hints(model)
    return [option(name, info, hints[name]) for name, info in model.model_fields.items()]


def build(model: type[BaseModel], values: dict[str, Any]) -> Any:
    """The typed configuration from parsed flags; its first complaint becomes one line, a RequestError."""
    from pydantic import ValidationError

    try:
        return model(**{name: values[name] for name in model.model_fields})
    except ValidationError as error:
        fault = error.errors()[0]
        name = flag(str(fault["loc"][0]))
        raise RequestError(f"{name} {fault['input']}: {fault['msg'][0].lower()}{fault['msg'][1:]}") from error


def stage_command(stage: str, name: str) -> Callable[..., None]:
    """A command function whose signature is SOURCE, OUT, the method's fields and the stage's options."""
    method_type, options_type = method_class(stage, name), options_class(stage, name)
    several = stage_of(stage, name).several

    def command(out: Path, **values: Any) -> None:
        source, quiet = values["sources" if several else "source"], values["quiet"]
        method, options = build(method_type, values), build(options_type, values)
        try:
            result = runner(stage, name)(method, source, out, options, quiet=quiet)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted; the same command with --resume goes on") from error
        log(result.get("note") or summary(result), quiet)
        if values["verbose"] and "time_shares" in result:
            log("; ".join(f"{what} {seconds:.1f} s" for what, seconds in result["time_shares"].items()))
        typer.echo(json.dumps(result) if values["json_output"] else result["output"])
        if result.get("warning"):
            raise GateError(result["warning"])

    return with_parameters(command, [*places(several), *options_of(method_type), *options_of(options_type), *OUTPUT_PARAMETERS])


def places(several: bool = False) -> list[inspect.Parameter]:
    """SOURCE, or SOURCES, and OUT."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    source_help = typer.Argument(help="A folder, a Hub id, demo:smollm2-135m, or - to read the path from standard input.")
    out_help = typer.Argument(help="A folder that does not exist yet.")
    name, kind = ("sources", list[str]) if several else ("source", str)
    return [
        inspect.Parameter(name, positional, annotation=Annotated[kind, source_help]),
        inspect.Parameter("out", positional, annotation=Annotated[Path, out_help]),
    ]


def with_parameters(command: Callable[..., None], parameters: list[inspect.Parameter]) -> Callable[..., None]:
    """Give a command the signature from which Typer builds its arguments and options."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def summary(result: dict[str, Any]) -> str:
    """One line for people: what became of the checkpoint."""
    before, after = result["bytes_before"], result["bytes_after"]
    parameters = f"{result['parameters_before'] / 1e6:.1f} M -> {result['parameters_after'] / 1e6:.1f} M parameters"
    line = (
        f"{result['stage']} {result['method']}: {parameters}, {before / 1e6:.0f} MB -> {after / 1e6:.0f} MB, "
        f"in {result['seconds']:.0f} s, peak {result['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    if "kl_held_back" in result:
        line += (
            f"; {result['bits_per_weight']:.2f} bits a weight, on held-back text KL {result['kl_held_back']:.4f}, "
            f"{result['top1_held_back']:.1%} of the most likely tokens unchanged"
        )
    if "kl_before" in result:
        line += (
            f"; rank {result['rank_total']} in all, on held-back text KL {result['kl_before']:.4f} -> {result['kl_after']:.4f}"
        )
    if result.get("held_back_after"):
        before, after = (result[key]["loss"] for key in ("held_back_before", "held_back_after"))
        line += f"; training loss {result['loss_curve']}, held-back response loss {before:.4f} -> {after:.4f}"
    return line


def add_stages(app: typer.Typer, wanted: str) -> None:
    """Give every stage its group; only the wanted one ("" for all) gets its methods, which takes a moment each."""
    from compresskit import vector_commands  # which builds on this module

    for stage, methods in METHODS.items():
        group = typer.Typer(help=STAGES[stage].summary, no_args_is_help=True, rich_markup_mode=None)
        group.callback()(lambda: None)
        if wanted in (stage, ""):
            for name, entry in methods.items():
                group.command(name, help=f"{entry.summary} {entry.paper}".strip())(stage_command(stage, name))
        if stage == "merge":
            group.command("similarity")(vector_commands.similarity)
        app.add_typer(group, name=stage)
    app.command("evaluate", help=STAGES["evaluate"].summary)(evaluate_command() if wanted in ("evaluate", "") else lambda: None)
    app.command("inspect")(inspect_source)
    expand = vector_commands.expand_command() if wanted in ("expand", "") else lambda: None
    app.command("expand", help=vector_commands.EXPAND_HELP)(expand)
    add_recipe_commands(app)


def evaluate_command() -> Callable[..., None]:
    """`evaluate SOURCE` with the flags of its options."""
    from compresskit.pipeline.evaluation import EvaluateOptions, evaluate
    from compresskit.pipeline.table import table

    def command(source: str, **values: Any) -> None:
        quiet: bool = values["quiet"]
        report = evaluate(source, build(EvaluateOptions, values), quiet=quiet)
        typer.echo(json.dumps(report) if values["json_output"] else table(report))
        if report["warning"]:
            log(f"compresskit: warning: {report['warning']}")
        missed = [gate for gate in report["gates"] if not gate["passed"]]
        if missed:
            raise GateError("; ".join(str(GateResult(**gate)) for gate in missed))

    from compresskit.evaluate.gates import GateResult

    help_text = "A folder, a Hub id, demo:smollm2-135m, or - to read the path from standard input."
    positional = inspect.Parameter(
        "source", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Annotated[str, typer.Argument(help=help_text)]
    )
    return with_parameters(command, [positional, *options_of(EvaluateOptions), *OUTPUT_PARAMETERS])


def inspect_source(
    source: Annotated[str, typer.Argument(help="A checkpoint or adapter folder, a Hub id, or - for standard input.")],
    json_output: Json = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Accept a checkpoint that brings code.")] = False,
    verbose: Verbose = False,
) -> None:
    """Show what a checkpoint or adapter holds: family, widths, bits, bytes, and how it was made."""
    from compresskit.pipeline.inspection import inspect as look
    from compresskit.pipeline.inspection import listing

    found = look(source, trust_remote_code)
    typer.echo(json.dumps(found) if json_output else listing(found))


@app.command()
def methods(json_output: Json = False) -> None:
    """List every stage's methods, with paper and one line each."""
    if json_output:
        table = {stage: {n: {"paper": e.paper, "summary": e.summary} for n, e in m.items()} for stage, m in METHODS.items()}
        typer.echo(json.dumps(table))
        return
    for stage, entries in METHODS.items():
        for name, entry in entries.items():
            typer.echo(f"{stage:10} {name:12} {entry.paper or '-':18} {entry.summary}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stopped_by = _listen()
    completing = any(name.startswith("_COMPRESSKIT") for name in os.environ)
    add_stages(app, "" if completing else next((a for a in arguments if not a.startswith("-")), "none"))
    try:
        status = app(args=arguments, prog_name="compresskit", standalone_mode=False)
        code = status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = _failed("interrupted", Interrupted.exit_code, arguments)
    except Exception as error:
        message, code = _described(error)
        if stopped_by and code != Interrupted.exit_code:  # a library made an error of its own of the interrupt
            message, code = f"interrupted ({message})", Interrupted.exit_code
        code = _failed(message, code, arguments)
    sys.stdout.flush()
    sys.exit(code)


def _listen() -> list[int]:
    """Raise KeyboardInterrupt at SIGTERM and, unless it is ignored, at SIGINT; the list fills with what came."""
    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    return received


def _described(error: Exception) -> tuple[str, int]:
    """One line and the exit code: ours know theirs, the parser's own are wrong usage, anything else is a failure."""
    if isinstance(error, CompresskitError):
        return str(error), error.exit_code
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error), 2
    if hasattr(error, "format_message"):
        return " ".join(error.format_message().split()), 2
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}", 1
    return f"{type(error).__name__}: {' '.join(str(error).split())} (--verbose shows where)", 1


def _failed(message: str, code: int, arguments: list[str]) -> int:
    if "--verbose" in arguments and sys.exc_info()[0] is not None:
        traceback.print_exc(file=sys.stderr)
    log(message if message.startswith("Usage:") else f"compresskit: error: {message}")
    return code
