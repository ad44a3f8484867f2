"""Open a checkpoint's tokenizer with transformers, and use it; what a damaged one raises names its folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import LARGEST_BYTES, LARGEST_CONFIG_BYTES, check_regular, first_line, read_json
from compresskit.errors import CheckpointError, CompresskitError
from compresskit.models.architectures import RAGGED_PREFIX
from compresskit.models.model import Model

FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files from which transformers makes a tokenizer."""
CONFIGURATIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json")
PANIC = "PanicException"
"""What the Rust of tokenizers raises where it finds a case impossible; it is no Exception, and has no public name."""


def open_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """Open the tokenizer of a checkpoint. The code in a ragged checkpoint's folder is never run.

    Returns:
        What `AutoTokenizer.from_pretrained` gives.

    Raises:
        CheckpointError: there is no usable tokenizer, or it brings code of its own that is not allowed.
    """
    from transformers import AutoTokenizer

    from compresskit.checkpoint.stock import quiet

    check_files(folder)
    config_file = folder / "config.json"
    model_type = read_json(config_file, LARGEST_CONFIG_BYTES).get("model_type") if config_file.is_file() else None
    ragged = isinstance(model_type, str) and model_type.startswith(RAGGED_PREFIX)
    with tokenizing(folder), quiet():  # it would warn about the ragged model type, which does not affect the tokenizer
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code and not ragged)


def check_files(folder: Path) -> None:
    """Raise CheckpointError if one of the tokenizer's files is too large, no file, or a configuration that is no JSON."""
    for name in FILES:
        file = folder / name
        if not file.exists():
            continue
        size = check_regular(file)
        if size > LARGEST_BYTES:
            raise CheckpointError(f"{file}: {size:,} bytes, at most {LARGEST_BYTES:,} are read; restore the file from its source")
        if name in CONFIGURATIONS:
            read_json(file, LARGEST_CONFIG_BYTES)


@contextmanager
def tokenizing(folder: Path) -> Iterator[None]:
    """Turn whatever transformers and tokenizers raise into a CheckpointError that names the folder."""
    try:
        yield
    except CompresskitError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise CheckpointError(
            f"{folder}: no usable tokenizer ({first_line(error)}); copy tokenizer.json and tokenizer_config.json into it"
        ) from error


def check_vocabulary(model: Model, largest: int) -> None:
    """Raise CheckpointError if the largest token of a text is none of the model's."""
    known = model.vocabulary
    if largest >= known:
        raise CheckpointError(
            f"{model.checkpoint.folder}: its tokenizer gives token {largest}, the model knows {known}; restore its own tokenizer"
        )
