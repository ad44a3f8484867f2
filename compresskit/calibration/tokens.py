"""Encode text with a checkpoint's own tokenizer, without truncation. Does not import torch for calibration text."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from compresskit.models.tokenizer import check_files, open_tokenizer, tokenizing

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
    """
    file = folder / "tokenizer.json"
    if special_tokens or not file.is_file():
        return _encode_with_transformers(folder, text, special_tokens, trust_remote_code)
    check_files(folder)
    ids: list[int] = []
    with tokenizing(folder):
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
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
    tokenizer = open_tokenizer(folder, trust_remote_code)
    with tokenizing(folder):
        # verbose=False: windows handle texts longer than the model's context, so no warning is needed.
        ids: list[int] = tokenizer(text, add_special_tokens=special_tokens, truncation=False, verbose=False)["input_ids"]
    return ids
