"""Models of the Hub: how they are written as SOURCE, and their download.

org/name, org/name@REVISION, hf://org/name[@REVISION]     REVISION: a branch, a tag or a commit
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import CheckpointError, RequestError

SCHEME = "hf://"
PART = r"[A-Za-z0-9][\w.-]*"
WRITTEN = re.compile(rf"({PART}/{PART})(?:@([A-Za-z0-9][\w./-]*))?")
SNAPSHOT = re.compile(r"models--(.+?)--(.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md", "*.py"]
"""What is downloaded: no pickles."""
LOG_IN = "hf auth login (or set HF_TOKEN)"


class HubModel(NamedTuple):
    """A model on the Hub."""

    name: str
    """OWNER/NAME."""
    revision: str | None
    """Branch, tag or commit; None for the main branch."""


def hub_model(source: str) -> HubModel | None:
    """The model that SOURCE names on the Hub: with `hf://`, or where no such folder exists.

    Returns:
        The model; None for a path.

    Raises:
        RequestError: what follows `hf://` is no OWNER/NAME[@REVISION].
    """
    rest = source.removeprefix(SCHEME)
    found = WRITTEN.fullmatch(rest)
    if found is None:
        if rest != source:
            raise RequestError(f"{shown(source)}: write {SCHEME}OWNER/NAME, or {SCHEME}OWNER/NAME@REVISION")
        return None
    return HubModel(found[1], found[2]) if rest != source or not _exists(source) else None


def written_name(text: str) -> str | None:
    """OWNER/NAME of what is written as a model of the Hub, None for anything else; no folder is looked at."""
    found = WRITTEN.fullmatch(text.removeprefix(SCHEME))
    return found[1] if found else None


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except OSError:  # too long a name for a file
        return False


def download(model: HubModel, written: str) -> Path:
    """Download a model's snapshot into the Hub's own cache; without a network what lies there is used. `written`: as SOURCE.

    Returns:
        The folder of the snapshot, which is named by its commit.

    Raises:
        CheckpointError: there is no such model or revision, its licence is not accepted, or the Hub cannot be asked.
    """
    from huggingface_hub import constants, errors, snapshot_download

    missing = f"{written}:" if written.startswith(SCHEME) else f"{written}: no such folder here, and"
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=FILES))
    except errors.GatedRepoError as error:
        page = f"{constants.ENDPOINT}/{model.name}"
        raise CheckpointError(f"{written}: is gated; accept its licence at {page}, then {LOG_IN}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{written}: {model.name} has no branch, tag or commit {model.revision}; check it") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(f"{missing} the Hub has no such model; check the name, or, if it is private, {LOG_IN}") from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError, ValueError) as error:
        if constants.is_offline_mode():
            raise CheckpointError(
                f"{missing} HF_HUB_OFFLINE is set and the Hub's cache lacks it; unset it, or download the model once"
            ) from error
        reason = first_line(error.__cause__ or error)
        raise CheckpointError(f"{missing} the Hub cannot be reached ({reason}); give the path of a checkpoint folder") from error


def origin(folder: Path) -> dict[str, str] | None:
    """Where a folder of the Hub's cache comes from, for the manifest: model and commit; None for other folders."""
    place = folder.absolute()
    named = SNAPSHOT.fullmatch(place.parent.parent.name)
    if named is None or place.parent.name != "snapshots" or not COMMIT.fullmatch(place.name):
        return None
    return {"model": f"{named[1]}/{named[2]}", "commit": place.name}
