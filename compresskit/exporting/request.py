"""Request of `export`: its options."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class ExportOptions(BaseModel):
    """Besides the method's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    overwrite: bool = False
    """Replace an existing OUT once the work is complete."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
