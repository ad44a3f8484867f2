"""The recipe commands: run, plan, report and schema."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from compresskit.cli import ci_files
from compresskit.cli.flags import Quiet, Verbose, interruptible
from compresskit.cli.streams import log, show
from compresskit.errors import GateError, RequestError

RECIPE_HELP = "A YAML file, or the name of a shipped recipe (compresskit run --list)."
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
Source = Annotated[str | None, typer.Option(help="Override the recipe's source.")]
Set = Annotated[list[str], typer.Option("--set", help="Set a variable of the recipe, NAME=VALUE; may be repeated.")]


def add_recipe_commands(app: typer.Typer) -> None:
    """Add run, plan, report and schema to the command line."""
    app.command("run")(run)
    app.command("plan")(plan)
    app.command("report")(report)
    app.command("schema")(schema)


def _load(recipe: str | None, source: str | None, given: list[str]) -> Any:
    from compresskit.recipe.reading import load
    from compresskit.recipe.shipped import find

    if recipe is None:
        raise RequestError("RECIPE is missing; give a YAML file or a name out of compresskit run --list")
    values = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise RequestError(f"--set {text}: write NAME=VALUE")
        values[name] = value
    return load(find(recipe), values | ({"source": source} if source else {}))


def run(  # noqa: PLR0913, PLR0917 - each parameter is a flag
    recipe: Annotated[str | None, typer.Argument(help=RECIPE_HELP)] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder of the run; an existing run is resumed.")] = None,
    list_recipes: Annotated[bool, typer.Option("--list", help="List the shipped recipes.")] = False,
    source: Source = None,
    given: Set = [],  # noqa: B006
    first: Annotated[str | None, typer.Option("--from", help="Redo this step and all steps after it.")] = None,
    only: Annotated[str | None, typer.Option(help="Redo only this step.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done without doing it.")] = False,
    on: Annotated[str | None, typer.Option(help="Run the steps on a Ray cluster, side by side: ray, or ray:HOST:PORT.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Start over if the folder already holds a run.")] = False,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    summary: Annotated[Path | None, typer.Option(help="Append a Markdown summary here and to $GITHUB_STEP_SUMMARY.")] = None,
    json_output: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run all steps of a recipe, resuming an existing run, then check the gates (exit code 3 if one fails)."""
    from compresskit.recipe import run, verdict

    if list_recipes:
        _list(json_output)
        return
    loaded = _load(recipe, source, given)
    if out is None:
        raise RequestError("OUT is missing; give the folder that the run shall write")
    if first and only:
        raise RequestError(f"--from {first} --only {only}: choose one of them")
    files = None if dry_run else ci_files.asked_for(junit, summary)
    say = partial(log, quiet=quiet)
    with interruptible("" if overwrite or dry_run else "the same command goes on"):
        result = run.run(loaded, out, run.Wanted(first, only, dry_run, overwrite, quiet, on), say)
        if files:
            from compresskit.report.page import write_reports

            write_reports(out, result)
            ci_files.write(files, result)
    if files:
        if shown := verdict.ending(result):
            say(f"{shown}\n")
        say(verdict.sentence(result))
        if result["gates"]:
            say(verdict.gate_table(result))
    show(json.dumps(result) if json_output else str(out))
    missed = [gate for gate in result.get("gates", []) if not gate["passed"]]
    if missed:
        raise GateError(f"{len(missed)} of {len(result['gates'])} gates missed: " + "; ".join(_short(gate) for gate in missed))


def _short(gate: dict[str, Any]) -> str:
    found = "no value" if gate["value"] is None else f"{gate['value']:.4g}"
    return f"{gate['step']}: {gate['metric']}{gate['operator']}{gate['limit']:g}, found {found}"


def _list(json_output: bool) -> None:
    from compresskit.recipe.shipped import listing

    found = listing()
    show(json.dumps(found) if json_output else "\n".join(f"{name:16} {text}" for name, text in found.items()))


def plan(
    recipe: Annotated[str, typer.Argument(help=RECIPE_HELP)],
    source: Source = None,
    given: Set = [],  # noqa: B006
    probe: Annotated[bool, typer.Option(help="Run a short benchmark on this machine to estimate the time of each step.")] = True,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the parameters, bytes, memory and time of every step of a recipe without running it."""
    from compresskit.recipe.plan import plan as make_plan
    from compresskit.recipe.plan import table

    found = make_plan(_load(recipe, source, given), probe)
    show(json.dumps(found) if json_output else table(found))


def report(
    out: Annotated[Path, typer.Argument(help="Folder of a run.")],
    reference_points: Annotated[
        Path | None, typer.Option(help="JSON file of others' sizes and qualities, for the chart.")
    ] = None,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Rewrite report.html and the model card of a run."""
    from compresskit.report.collecting import read_result
    from compresskit.report.page import write_reports
    from compresskit.report.reference_points import read_points

    result = read_result(out)
    page = write_reports(out, result, read_points(reference_points, result) if reference_points else {})
    show(json.dumps({"stage": "report", "output": str(page)}) if json_output else str(page))


def schema() -> None:
    """Print the JSON Schema of recipes."""
    from compresskit.recipe.schema import schema as made

    show(json.dumps(made()))
