"""Map settings to command-line flags, and parsed flags back to typed settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_origin, get_type_hints

import typer

from compresskit.errors import Interrupted, RequestError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the output's path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only errors on standard error.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Print details and tracebacks on standard error.")]
OUTPUT_PARAMETERS = (
    inspect.Parameter("json_output", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet),
    inspect.Parameter("verbose", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Verbose),
)
SOURCE_HELP = "A folder, a Hub id (OWNER/NAME[@REVISION]), demo:smollm2-135m, or - to read the path from standard input."


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """Turn an interrupt into an error that says how the work goes on; `advice` is "" where it starts over."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted("; ".join(filter(None, ("interrupted", advice)))) from error


def flag(name: str) -> str:
    """Spell a field as a command-line flag."""
    return "--" + name.replace("_", "-")


def option(name: str, info: FieldInfo, annotation: Any) -> inspect.Parameter:
    """Build the command-line option of a field: name, type, default and help."""
    if get_origin(annotation) is tuple:
        several: Any = Annotated[list[str], typer.Option(flag(name), help=info.description)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=[], annotation=several)
    annotation = bool if annotation == bool | None else annotation
    extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
    short = [str(extra["short"])] if "short" in extra else []
    off = extra.get("off", f"--no-{flag(name)[2:]}")
    spelling = f"{flag(name)}/{off}" if annotation is bool else flag(name)
    typed: Any = Annotated[_plain_type(annotation), typer.Option(spelling, *short, help=info.description)]
    default = inspect.Parameter.empty if info.is_required() else info.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=typed)


def _plain_type(annotation: Any) -> Any:
    """Drop choices and bounds: the typed settings check them and explain more than the parser can."""
    if get_origin(annotation) is UnionType:
        return str | None
    return annotation if annotation in (int, float, bool) else str


def options_of(model: type[BaseModel]) -> list[inspect.Parameter]:
    """Build an option for every field."""
    hints = get_type_hints(model)
    return [option(name, info, hints[name]) for name, info in model.model_fields.items()]


def build(model: type[BaseModel], values: dict[str, Any]) -> Any:
    """Build typed settings from parsed flags. Raises RequestError with the first complaint as one line."""
    from pydantic import ValidationError

    try:
        return model(**{name: values[name] for name in model.model_fields})
    except ValidationError as error:
        fault = error.errors()[0]
        name = flag(str(fault["loc"][0]))
        raise RequestError(f"{name} {fault['input']}: {fault['msg'][0].lower()}{fault['msg'][1:]}") from error


def places(several: bool = False, out: str = "folder") -> list[inspect.Parameter]:
    """Build the arguments SOURCE (or SOURCES) and OUT, a folder or a file."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    source_help = typer.Argument(help=SOURCE_HELP)
    out_help = typer.Argument(help=f"Output {out}; must not exist unless --overwrite is given.")
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
