"""The command line's grammar: all commands, built for each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import compresskit
from compresskit import distributed
from compresskit.cli.machine import add_machine_commands
from compresskit.cli.recipes import add_recipe_commands
from compresskit.cli.stages import add_stages
from compresskit.errors import RequestError

SHARED_STAGES = ("prune", "quantize", "compensate", "recover", "evaluate")
"""Commands whose work ranks share."""
UNSHARED_METHODS = ("quantize compeft", "prune vocabulary")
HELP = "Make Hugging Face language models smaller: prune, quantize, and measure the cost."


def application(wanted: Sequence[str]) -> typer.Typer:
    """Build the command line. `wanted`: the arguments that may be a command and its method, none for all commands.

    Returns:
        The application; of all methods only the wanted one has its flags, which take a moment to make.
    """
    app = typer.Typer(
        name="compresskit",
        help=HELP,
        add_completion=True,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback(help=HELP)(root)
    add_stages(app, wanted)
    add_recipe_commands(app)
    add_machine_commands(app)
    return app


def called(arguments: list[str], completing: bool) -> int:
    """Do what the arguments say, or tell a shell that is `completing` what could follow; the exit code."""
    if not completing:
        _check_ranks(arguments)
    app = application([] if completing else [*(each for each in arguments if not each.startswith("-")), "none", "none"])
    command = typer.main.get_command(app)
    if completing:
        command.main(arguments, prog_name="compresskit", standalone_mode=False)
        return 0
    # Not by command.main: it makes of an interrupt an exit without a word, and of a closed pipe a failure.
    try:
        with command.make_context("compresskit", arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _check_ranks(arguments: list[str]) -> None:
    """Refuse several processes for what one does; raises RequestError."""
    names = [each for each in arguments if not each.startswith("-")][:2]
    if distributed.asked_count() > 1 and names and (names[0] not in SHARED_STAGES or " ".join(names) in UNSHARED_METHODS):
        raise RequestError(
            f"{' '.join(names)}: does not share its work among processes, torchrun started {distributed.asked_count()}; "
            "start it without torchrun"
        )


def version(value: bool) -> None:
    """Print the version and exit, if asked."""
    if value:
        typer.echo(compresskit.__version__)
        raise typer.Exit


def root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the flags that stand before any command."""
