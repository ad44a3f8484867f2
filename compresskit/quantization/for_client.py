"""`--for`: store a form that a named client has a kernel for, and refuse others before any work (formats/clients.py)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, model_validator

from compresskit.errors import RequestError
from compresskit.formats.clients import GRID, NF4, STATIC, Client, Form, needs_symmetry, refusal
from compresskit.numerics.fixed_scheme import FixedScheme
from compresskit.numerics.scheme import Scheme
from compresskit.stages import Method


class ForClient(Method):
    """A method whose result a named client runs."""

    for_client: Annotated[Client | None, Field(json_schema_extra={"short": "--for"})] = None
    """Client that must run the result: its kernels decide what is left open, and forms without a kernel are refused."""

    @model_validator(mode="before")
    @classmethod
    def _choose_symmetry(cls, values: Any) -> Any:
        """Symmetric where the client runs these bits in no other way and nobody asked for zero points."""
        if not isinstance(values, dict) or "symmetric" not in cls.model_fields or values.get("symmetric") is not None:
            return values
        client, bits = values.get("for_client"), values.get("bits") or 4
        if values.get("format", "packed") != "packed":
            return values
        try:
            whole = int(bits)
        except (TypeError, ValueError):  # the field's own check says what is wrong with it
            return values
        return values | {"symmetric": True} if client and whole == float(bits) and needs_symmetry(client, whole) else values

    def check_client(self, schemes: Iterable[Scheme | None]) -> None:
        """Raise RequestError where the client has no kernel for a linear's form; it says what would work."""
        if self.for_client is None:
            return
        for scheme in dict.fromkeys(schemes):
            kind = GRID
            if isinstance(scheme, FixedScheme):
                kind = scheme.format + (STATIC if scheme.activations == "static" else "")
            form = Form(kind, scheme.bits, scheme.symmetric, scheme.group_size) if scheme else Form(NF4)
            reason = refusal(self.for_client, form)
            if reason:
                raise RequestError(f"--for {self.for_client}: {reason}")
