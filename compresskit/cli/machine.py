"""The commands about this machine: doctor, and the user's cache."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compresskit.cli.flags import Json, Verbose
from compresskit.cli.streams import log, show
from compresskit.errors import CompresskitError, RequestError

if TYPE_CHECKING:
    from compresskit.checkpoint.cache_entries import Entry

Kind = Annotated[list[str], typer.Option("--kind", help="Only this kind: demo, calibration or structures; may be repeated.")]


def add_machine_commands(app: typer.Typer) -> None:
    """Add doctor and cache to the command line."""
    app.command("doctor")(doctor)
    cache = typer.Typer(help="List the user's cache, or clean it.", no_args_is_help=True, rich_markup_mode=None)
    cache.command("list")(cache_list)
    cache.command("clean")(cache_clean)
    app.add_typer(cache, name="cache")


def doctor(json_output: Json = False, verbose: Verbose = False) -> None:
    """Examine the installation, the devices and the cache, and say what keeps stages from running (exit code 1)."""
    from compresskit.report.doctor import doctor as examine
    from compresskit.report.doctor import listing

    found = examine()
    show(json.dumps(found) if json_output else listing(found))
    if found["problems"]:
        raise CompresskitError("; ".join(found["problems"]))


def cache_list(kind: Kind = [], json_output: Json = False, verbose: Verbose = False) -> None:  # noqa: B006
    """List what the cache holds, oldest first: kind, size, age in days and path."""
    from compresskit.checkpoint.cache_entries import entries

    found = entries(kind)
    show(json.dumps(_result("list", found)) if json_output else _listing(found))


def cache_clean(
    older_than: Annotated[float, typer.Option(help="Only what is at least this many days old.")] = 0.0,
    kind: Kind = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    json_output: Json = False,
    verbose: Verbose = False,
) -> None:
    """Remove what the cache holds; all of it is made again when it is next needed."""
    from compresskit.checkpoint.cache_entries import entries, remove

    if not 0 <= older_than < float("inf"):
        raise RequestError(f"--older-than {older_than}: expected a number of days from 0 on")
    found = entries(kind, older_than)
    kept = {} if dry_run else {each: reason for each in found if (reason := remove(each))}
    for reason in kept.values():
        log(f"compresskit: warning: {reason}")
    gone = [each for each in found if each not in kept]
    result = _result("clean", gone) | {"dry_run": dry_run, "kept": [str(each.path) for each in kept]}
    show(json.dumps(result) if json_output else _listing(gone))


def _result(command: str, found: list[Entry]) -> dict[str, Any]:
    """What `--json` prints: every entry, and the bytes of all."""
    from compresskit.checkpoint.cache import cache_folder

    listed = [{"kind": e.kind, "path": str(e.path), "bytes": e.bytes, "days": round(e.days, 3)} for e in found]
    return {"stage": f"cache {command}", "folder": str(cache_folder()), "bytes": sum(e.bytes for e in found), "entries": listed}


def _listing(found: list[Entry]) -> str:
    from compresskit.numerics.units import readable_bytes

    lines = [f"{each.kind:12} {readable_bytes(each.bytes):>9} {each.days:7.1f} days  {each.path}" for each in found]
    return "\n".join([*lines, f"{len(found)} entries, {readable_bytes(sum(each.bytes for each in found))}"])
