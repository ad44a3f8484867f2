"""What an exception says on the command line: one line that names what is known, and the exit code."""

from __future__ import annotations

import os
import traceback
from pathlib import Path
from typing import Any

import compresskit
from compresskit.cli.streams import STANDARD_OUTPUT, one_line
from compresskit.errors import CompresskitError

PACKAGE = Path(compresskit.__file__).parent
CLOSED_PIPE = 141
"""Exit code, as of a command that SIGPIPE ended: whoever read standard output has gone."""
MEMORY_HELP = "give fewer --samples or a shorter --sequence-length; compresskit plan says what a recipe needs"


def described(error: Exception) -> tuple[str, int]:
    """Return the message, "" for none, and the exit code. Parser errors exit with 2, unknown errors with 1."""
    if isinstance(error, CompresskitError):
        return one_line(str(error)), error.exit_code
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(error), 2
    if hasattr(error, "format_message"):
        return one_line(_of_another_method(error) or error.format_message()), 2
    if isinstance(error, OSError) and error.strerror:
        return _of_the_system(error)
    text = one_line(str(error))
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return f"out of memory{_after(text)}; {MEMORY_HELP}", 1
    what = "a file or a model is nested too deeply" if isinstance(error, RecursionError) else type(error).__name__
    return f"{what}{_after(text)}{_where(error)}", 1


def _of_another_method(error: Exception) -> str:
    """Which methods of the stage take an option that this one does not; "" for other errors, and where none does."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if type(error).__name__ != "NoSuchOption" or context is None or context.parent is None:
        return ""
    methods = _methods(str(context.parent.info_name))
    takers = [name for name, method in methods.items() if any(option in each.opts for each in method.params)]
    have = f"{' and '.join(takers)} {'have' if len(takers) > 1 else 'has'} it"
    return f"No such option: {option} of {context.info_name}; {have}" if takers else ""


def _methods(stage: str) -> dict[str, Any]:
    """The commands of a stage's methods with all their flags, which this run made for its own method alone."""
    import typer

    from compresskit.cli.application import application

    groups: dict[str, Any] = getattr(typer.main.get_command(application(())), "commands", {})
    return getattr(groups.get(stage), "commands", {})


def _after(text: str) -> str:
    return f": {text}" if text else ""


def _of_the_system(error: OSError) -> tuple[str, int]:
    """An error of the operating system: which file, or both of a renaming, and why."""
    if isinstance(error, BrokenPipeError) and error.filename == STANDARD_OUTPUT:
        return "", CLOSED_PIPE
    files = [os.fsdecode(each) for each in (error.filename, error.filename2) if isinstance(each, str | bytes | os.PathLike)]
    if files:
        return one_line(f"{' -> '.join(files)}: {error.strerror}"), 1
    return f"{one_line(str(error.strerror))}{_where(error)}", 1


def _where(error: Exception) -> str:
    """The innermost function below the command line that the error passed, with the paths it was given."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    folders = [Path(frame.f_code.co_filename).parents for frame in frames]
    found = [frame for frame, above in zip(frames, folders, strict=True) if PACKAGE in above and PACKAGE / "cli" not in above]
    if not found:
        return " (--verbose shows where)"
    frame, code = found[-1], found[-1].f_code
    given = [frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount]]
    paths = ", ".join(str(each) for each in given if isinstance(each, Path))
    source = Path(code.co_filename).relative_to(PACKAGE).as_posix()
    given_paths = f" with {one_line(paths)}" if paths else ""
    return f" (in {code.co_name} of {source}{given_paths}; --verbose shows where)"
