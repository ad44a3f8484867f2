"""The command line of task vectors beside `quantize compeft` and `merge METHOD`: expand, merge similarity. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compresskit.cli import OUTPUT_PARAMETERS, Json, Verbose, build, log, options_of, places, summary, with_parameters

EXPAND_HELP = "Turn a ternary task vector back into a normal PEFT adapter or checkpoint."


def expand_command() -> Callable[..., None]:
    """`expand SOURCE OUT` with the flags of its options."""
    from compresskit.pipeline.expansion import ExpandOptions, expand

    def command(source: str, out: Path, **values: Any) -> None:
        result = expand(source, out, build(ExpandOptions, values), quiet=values["quiet"])
        log(summary(result), values["quiet"])
        typer.echo(json.dumps(result) if values["json_output"] else result["output"])

    return with_parameters(command, [*places(), *options_of(ExpandOptions), *OUTPUT_PARAMETERS])


def similarity(
    sources: Annotated[list[str], typer.Argument(help="Adapters, ternary or not, or checkpoints with --base.")],
    base: Annotated[str | None, typer.Option(help="The checkpoint that the sources were fine-tuned from.")] = None,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show the cosine similarity between task vectors; merges nothing."""
    from compresskit.pipeline.similarity import listing
    from compresskit.pipeline.similarity import similarity as measure

    found = measure(sources, base)
    typer.echo(json.dumps(found) if json_output else listing(found))
