"""Encode text with a checkpoint's own tokenizer, without truncation. Does not import torch for calibration text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from compresskit.errors import CheckpointError

PIECE_CHARACTERS = 1 << 22
"""Longer texts are encoded in pieces of this size: encoding 64 MiB at once takes 10 GB of memory."""


def encode(folder: Path, text: str, special_tokens: bool, trust_remote_code: bool = False) -> list[int]:
    """Encode a text of any length with the folder's own tokenizer.

    With `special_tokens`, the result is `AutoTokenizer.from_pretrained(folder)(text).input_ids`. Without, the folder's
    tokenizer.json is applied directly. Texts above `PIECE_CHARACTERS` are then cut before spaces and encoded piece by piece,
    which may change the tokens next to a cut.

    Returns:
        Token ids of the whole text.

    Raises:
        CheckpointError: the folder holds no usable tokenizer.
    """  # noqa: DOC501 (_unusable makes that error)
    file = folder / "tokenizer.json"
    if special_tokens or not file.is_file():
        return _encode_with_transformers(folder, text, special_tokens, trust_remote_code)
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise _unusable(folder, error) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: list[int] = []
    for piece in pieces(text):
        ids.extend(tokenizer.encode(piece, add_special_tokens=False).ids)
    return ids


def pieces(text: str) -> list[str]:
    """Split the text into parts of at most `PIECE_CHARACTERS`, before a space if there is one."""
    parts = []
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = text.rfind(" ", start + 1, start + PIECE_CHARACTERS)
        end = cut if cut > 0 else start + PIECE_CHARACTERS
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _encode_with_transformers(folder: Path, text: str, special_tokens: bool, trust_remote_code: bool) -> list[int]:
    from transformers import AutoTokenizer

    from compresskit.checkpoint.stock import quiet

    try:
        with quiet():  # it would warn about the ragged model type, which does not affect the tokenizer
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise _unusable(folder, error) from error
    # verbose=False: windows handle texts longer than the model's context, so no warning is needed.
    ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, truncation=False, verbose=False)["input_ids"]
    return ids


def _unusable(folder: Path, error: Exception) -> CheckpointError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return CheckpointError(f"{folder}: no usable tokenizer ({reason}); copy tokenizer.json and tokenizer_config.json into it")
