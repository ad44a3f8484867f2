"""What an export method must provide: what a model's file, and an adapter's, will hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compresskit.stages import Method

if TYPE_CHECKING:
    from compresskit.exporting.planned import PlannedFile
    from compresskit.models.model import Model


class ExportMethod(Method):
    """Write a model, or an adapter, as one file."""

    ending: ClassVar[str] = ""
    """How the file's name ends, with the dot."""
    magic: ClassVar[bytes] = b""
    """First four bytes of such a file."""

    def model_file(self, model: Model) -> PlannedFile:
        """Plan the file of a checkpoint, without its adapter; refuses what cannot be exported, and reads no weights."""
        raise TypeError(f"{type(self).__name__} defines no model_file")

    def adapter_file(self, model: Model) -> PlannedFile:
        """Plan the file of a model's adapter; refuses what cannot be exported, and reads no weights."""
        raise TypeError(f"{type(self).__name__} defines no adapter_file")

    def write(self, planned: PlannedFile, path: Path, manifest: str, finished: Callable[[int], None]) -> dict[str, float]:
        """Write a planned file and the manifest in it, and tell `finished` of every tensor; the relative errors by name."""
        raise TypeError(f"{type(self).__name__} defines no write")
