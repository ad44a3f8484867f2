"""The command line: parse flags into a method and options, call the stage, print the result.

Standard output carries only the result; everything else goes to standard error.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated, Any

import typer

import compresskit
from compresskit.cli.flags import log
from compresskit.cli.recipes import add_recipe_commands
from compresskit.cli.stages import add_stages
from compresskit.errors import CompresskitError, Interrupted

HELP = "Make Hugging Face language models smaller: prune, quantize, and measure the cost."


def application(wanted: str) -> typer.Typer:
    """Build the command line; of the stages only the wanted one ("" for all) gets its methods, which take a moment each."""
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
    return app


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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    stopped_by = _listen()
    completing = any(name.startswith("_COMPRESSKIT") for name in os.environ)
    app = application("" if completing else next((a for a in arguments if not a.startswith("-")), "none"))
    try:
        status = app(args=arguments, prog_name="compresskit", standalone_mode=False)
        code = status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        code = _failed("interrupted", Interrupted.exit_code, arguments)
    except Exception as error:
        message, code = _described(error)
        if stopped_by and code != Interrupted.exit_code:  # a library turned the interrupt into its own error
            message, code = f"interrupted ({message})", Interrupted.exit_code
        code = _failed(message, code, arguments)
    sys.stdout.flush()
    sys.exit(code)


def _listen() -> list[int]:
    """Raise KeyboardInterrupt on SIGTERM and, unless ignored, on SIGINT. Returns a list that collects the received signals."""
    received: list[int] = []

    def stop(signum: int, frame: Any) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, stop)
    return received


def _described(error: Exception) -> tuple[str, int]:
    """Return the one-line message and the exit code of an error. Parser errors exit with 2, unknown errors with 1."""
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
