"""The parts of reference.md that are made from the code: methods, settings, commands, functions, errors.

A line `<!-- name -->` of the page is replaced by what the function of that name in `PARTS` returns, as Markdown.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx
from typer.models import ArgumentInfo, CommandInfo, OptionInfo

import compresskit
from compresskit import errors
from compresskit.cli import flags
from compresskit.cli.machine import add_machine_commands
from compresskit.cli.recipes import add_recipe_commands
from compresskit.cli.stages import add_stages
from compresskit.methods import METHODS, STAGES, Entry, method_class, options_class, stage_of

KINDS = {float: "number", int: "whole number", str: "text"}
BOUNDS = {"ge": "from", "gt": "above", "le": "to", "lt": "below", "multiple_of": "multiple of"}


def setup(app: Sphinx) -> None:
    """Sphinx calls this: fill the pages as they are read."""
    app.config.release = app.config.version = compresskit.__version__
    app.connect("source-read", fill)


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put the generated parts into a page."""
    source[0] = re.sub(r"^<!-- ([\w ]+) -->$", lambda found: PARTS[found[1]](), source[0], flags=re.MULTILINE)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def values(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a setting may be, in words."""
    origin = get_origin(annotation)
    if origin is Annotated:
        kind, *own = get_args(annotation)
        return values(kind, [each for one in own for each in getattr(one, "metadata", [one])])
    if origin in (UnionType, Union):
        return " or ".join(values(each, metadata) for each in get_args(annotation) if each is not NoneType)
    if origin is Literal:
        return ", ".join(f"`{each}`" for each in get_args(annotation))
    if origin is tuple:
        return f"{values(get_args(annotation)[0])}, may be repeated"
    if bool in (annotation, origin) or dict in (annotation, origin):
        return "on or off" if annotation is bool else "a table"
    bounds = [f"{word} {getattr(each, name)}" for name, word in BOUNDS.items() for each in metadata if hasattr(each, name)]
    return " ".join([KINDS[annotation], *bounds])


def shown(default: Any) -> str:
    """A default as it is written."""
    if default is PydanticUndefined:
        return "required"
    if default in (None, (), ""):
        return ""
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"`{default}`"


def settings(model: type[BaseModel]) -> str:
    """The table of a class's settings."""
    spelled = {parameter.name: parameter for parameter in flags.options_of(model)}
    rows = [
        [flag(spelled[name]), values(info.annotation, info.metadata), shown(info.default), info.description or ""]
        for name, info in model.model_fields.items()
    ]
    return table(["flag", "values", "default", "meaning"], rows) if rows else "No settings of its own.\n"


def flag(parameter: inspect.Parameter) -> str:
    """How a flag is written; what switches it off comes second."""
    kind, *rest = get_args(parameter.annotation)
    (info,) = (each for each in rest if isinstance(each, OptionInfo))
    plain = flags.flag(parameter.name)
    # Typer takes the spelling for a default, until it sees that the option stands inside Annotated.
    written = info.default if isinstance(info.default, str) else f"{plain}/--no-{plain[2:]}" if kind is bool else plain
    return " ".join(f"`{each}`" for each in written.split("/"))


def stages() -> str:
    """A section for every stage that has methods."""
    return "\n".join(_stage(name) for name in METHODS)


def _stage(stage: str) -> str:
    places = "SOURCES... OUT" if STAGES[stage].several else "SOURCE OUT"
    parts = [f"### {stage}\n", f"{STAGES[stage].summary} `compresskit {stage} METHOD {places}`\n"]
    parts += [_method(stage, name, entry) for name, entry in METHODS[stage].items()]
    parts += [f"#### Settings of every `{stage}`\n", settings(options_class(stage, ""))]
    return "\n".join(parts)


def _method(stage: str, name: str, entry: Entry) -> str:
    found = method_class(stage, name)
    module = importlib.import_module(found.__module__)
    parts = [f"#### {stage} {name}\n", f"{entry.summary} {entry.paper}".strip() + f" (`{found.__module__}.{found.__name__}`)\n"]
    parts += [settings(found)]
    if stage_of(stage, name) is not STAGES[stage]:
        parts += ["In place of the settings of every method of the stage:\n", settings(options_class(stage, name))]
    text = inspect.getdoc(module) or ""
    parts += [f"<details>\n<summary>What it computes</summary>\n\n```text\n{text}\n```\n\n</details>\n"]
    return "\n".join(parts)


def commands() -> str:
    """All commands, and the flags of those that belong to no method."""
    app = typer.Typer()
    add_recipe_commands(app)
    add_stages(app, ())
    add_machine_commands(app)
    found = {_name(each): each for each in app.registered_commands}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        for each in group.typer_instance.registered_commands:
            if _name(each) not in METHODS.get(str(group.name), {}):
                found[f"{group.name} {_name(each)}"] = each
    rows = [[f"[{stage} METHOD](#{stage})", STAGES[stage].summary] for stage in METHODS]
    rows += [[f"[{name}](#command-{name.replace(' ', '-')})", _help(each)] for name, each in found.items()]
    return table(["command", "what it does"], rows) + "\n" + "\n".join(_command(name, each) for name, each in found.items())


def _name(command: CommandInfo) -> str:
    return command.name or str(getattr(command.callback, "__name__", ""))


def _help(command: CommandInfo) -> str:
    return (command.help or inspect.getdoc(command.callback) or "").splitlines()[0]


def _command(name: str, command: CommandInfo) -> str:
    assert command.callback is not None
    hints = get_type_hints(command.callback, include_extras=True)
    arguments, flags = [], []
    for parameter in inspect.signature(command.callback).parameters.values():
        typed = parameter.replace(annotation=hints[parameter.name])
        info = next(each for each in get_args(typed.annotation) if isinstance(each, (OptionInfo, ArgumentInfo)))
        if isinstance(info, ArgumentInfo):
            several = get_origin(get_args(typed.annotation)[0]) is list
            arguments.append(parameter.name.upper() + ("..." if several else ""))
        else:
            flags.append([flag(typed), shown(_default(parameter)), info.help or ""])
    line = " ".join([name, *arguments])
    text = f"#### Command: {name}\n\n{_help(command)} `compresskit {line}`\n\n"
    return text + (table(["flag", "default", "meaning"], flags) if flags else "")


def _default(parameter: inspect.Parameter) -> Any:
    default = parameter.default
    return PydanticUndefined if default is inspect.Parameter.empty else tuple(default) if isinstance(default, list) else default


def functions() -> str:
    """The functions of the package, from their docstrings."""
    names = [
        *(
            f"api.{name}"
            for name in ("prune", "quantize", "search", "compensate", "recover", "evaluate", "export", "pack", "expand", "run")
        ),
        "register",
    ]
    return "```{eval-rst}\n" + "\n\n".join(f".. autofunction:: compresskit.{name}" for name in names) + "\n```\n"


def exceptions() -> str:
    """The exceptions, from their docstrings, each with its exit code."""
    lines = []
    for found in _tree(errors.CompresskitError):
        lines += [f".. autoexception:: compresskit.errors.{found.__name__}", "   :show-inheritance:", ""]
        lines += [f"   Exit code {found.exit_code}.", ""]
    return "```{eval-rst}\n" + "\n".join(lines) + "\n```\n"


def _tree(found: type[errors.CompresskitError]) -> Iterator[type[errors.CompresskitError]]:
    yield found
    for each in found.__subclasses__():
        if each.__module__ == errors.__name__:
            yield from _tree(each)


PARTS = {"stages": stages, "commands": commands, "functions": functions, "exceptions": exceptions}
