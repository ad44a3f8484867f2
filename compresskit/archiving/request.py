"""What `pack` takes."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field


class PackOptions(BaseModel):
    """How to pack."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    ending: ClassVar[str] = ".ckz"
    """How the file's name ends."""

    threads: Annotated[int, Field(ge=0)] = 0
    """Threads that encode; 0: one for each core that this process may use. The bytes are the same with any number."""
    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
