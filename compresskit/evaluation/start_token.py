"""The token with which a model's texts start: many models (Gemma, Llama) predict badly without it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from compresskit import calibration
from compresskit.errors import RequestError
from compresskit.models.tokenizer import open_tokenizer

PROBE = "a"
"""Any text that every tokenizer has tokens for."""


def first_token(folder: Path, bos: Literal["auto", "always", "never"], trust_remote_code: bool = False) -> int | None:
    """The token to put before every window.

    With "auto" it is what the folder's tokenizer puts before a text by itself, as lm-eval has it.

    Returns:
        Its id; None for none.

    Raises:
        RequestError: "always" is asked for, and the tokenizer names no start token.
        CheckpointError: the folder holds no usable tokenizer.
    """
    if bos == "never":
        return None
    if bos == "always":
        named = open_tokenizer(folder, trust_remote_code).bos_token_id
        if named is None:
            raise RequestError(f"--bos always: the tokenizer in {folder} names no start token (bos_token); use --bos auto")
        return int(named)
    with_special, plain = (calibration.encode(folder, PROBE, special, trust_remote_code) for special in (True, False))
    begins = len(with_special) > len(plain) and with_special[:1] != plain[:1]
    return with_special[0] if begins else None
