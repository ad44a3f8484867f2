"""The flags with which a stage uploads its OUT to the Hub."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from compresskit.checkpoint.hub_upload import Upload
from compresskit.cli.streams import log
from compresskit.errors import RequestError

PUSH_HELP = "Upload OUT to this repository of the Hub, OWNER/NAME, once it is complete."
PUSH_PARAMETERS = (
    inspect.Parameter(
        "push_to_hub", inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[str | None, typer.Option("--push-to-hub", help=PUSH_HELP)],
    ),
    inspect.Parameter(
        "private", inspect.Parameter.KEYWORD_ONLY, default=False,
        annotation=Annotated[bool, typer.Option("--private", help="Make the repository a private one, if it is new.")],
    ),
)  # fmt: skip


def asked_upload(values: dict[str, Any]) -> Upload | None:
    """The upload that the flags ask for, checked; None if there is none. Raises RequestError where it cannot be done."""
    if values.get("push_to_hub") is None:
        if values.get("private"):
            raise RequestError("--private: is about a repository of the Hub; name it with --push-to-hub OWNER/NAME")
        return None
    found = Upload(values["push_to_hub"], values["private"])
    found.check()
    return found


def uploaded(upload: Upload | None, out: Path, result: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Upload a stage's result, if asked to; where there was nothing to do, its output is the source, which stays here.

    Returns:
        The result, with the commit's address as "hub".
    """
    if upload is None or result["output"] != str(out):
        return result
    from huggingface_hub.utils import disable_progress_bars

    if quiet:
        disable_progress_bars()
    address = upload.upload(out, f"{result['stage']} {result['method']}")
    log(f"uploaded: {address}", quiet)
    return result | {"hub": address}
