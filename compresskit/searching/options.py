"""Options of `search`: the target, the candidates, and what the search may cost."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.errors import RequestError
from compresskit.stages import Options, parse_bytes


class SearchOptions(Options):
    """Settings of a search; one of `bytes`, `bits` and `max_loss` is the target."""

    bytes: str | float | None = None
    """Target: a share of the model's bytes in 16 bits, such as 0.35, or a size such as 60MB; embedding and all included."""
    bits: Annotated[float, Field(ge=2, le=8)] | None = None
    """Target: as many bytes as `quantize --bits` with this average writes, symmetric and with its default groups."""
    max_loss: Annotated[float, Field(gt=0)] | None = None
    """Target: the fewest bytes whose measured KL divergence from the original, in nats a token, is at most this."""
    quantizer: Annotated[Literal["gptq", "apiq", "rtn"], Field(json_schema_extra={"short": "--method"})] = "gptq"
    """How the weights are rounded: gptq, apiq or rtn, each with its default settings."""
    clipping: Literal["none", "error"] = "error"
    """Range of a group of gptq and rtn: none, or error (narrowed to the least error), which at 2 bits decides."""
    levels: str = "2,3,4,8"
    """Bits that a unit may have."""
    group_sizes: str = "32,64,128"
    """Group sizes that a unit may have, of those that divide its inputs."""
    ignore: tuple[str, ...] = ()
    """Keep linears dense whose names contain this text; may be repeated."""
    embedding_bits: Annotated[int, Field(ge=16, le=16)] | None = None
    """16 stores embedding, head and final norm of a 32-bit source in 16 bits."""
    score_windows: Annotated[int, Field(ge=1)] = 8
    """Calibration windows of the backward pass that scores the options."""
    verify_windows: Annotated[int, Field(ge=1)] = 8
    """Windows on which trials are measured, of the same text and not of the calibration."""
    quick_windows: Annotated[int, Field(ge=1)] = 2
    """Of these the windows on which every trial is measured first; only the best go on to the rest."""
    passes: Annotated[float, Field(gt=0)] = 12.0
    """Forward passes of the calibration text in trials after which no more switches begin; the other trials always run."""
    run: bool = True
    """Write the model of the chosen point; else only the front and the recipe."""
    explain: bool = False
    """Print why each unit got what it got."""


def numbers(flag: str, text: str, lowest: int, highest: int) -> list[int]:
    """Read a list such as 2,3,4.

    Returns:
        Its whole numbers, rising and each once.

    Raises:
        RequestError: one is no whole number from lowest to highest.
    """
    found = set()
    for part in text.split(","):
        if not part.strip().isdecimal() or not lowest <= int(part) <= highest:
            raise RequestError(
                f"{flag} {text}: {part.strip()!r} is no whole number from {lowest} to {highest}; write such as 2,3,4"
            )
        found.add(int(part))
    return sorted(found)


def target_bytes(target: str | float, sixteen_bit_bytes: int) -> int:
    """Read a target: a share of the model's bytes in 16 bits up to 1, or a size with a unit.

    Returns:
        Bytes.

    Raises:
        RequestError: it is neither.
    """
    try:
        share = float(target)
    except ValueError:
        share = 0.0  # a size, or nothing
    if 0 < share <= 1:
        return int(share * sixteen_bit_bytes)
    try:
        return parse_bytes(str(target))
    except RequestError as error:
        raise RequestError(f"--bytes {target}: neither a share up to 1 nor a size; write 0.35 or 60MB") from error
