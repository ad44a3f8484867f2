"""Open the processor of a vision-language checkpoint: the tokenizer, and what turns images into the model's inputs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import LARGEST_CONFIG_BYTES, first_line, read_json
from compresskit.errors import CheckpointError, RequestError
from compresskit.models.model import Model
from compresskit.models.tokenizer import check_files

FILES = ("processor_config.json", "preprocessor_config.json")
"""Files that say how images are prepared; either is enough."""
FURTHER_FILES = ("video_preprocessor_config.json",)


def check_processor(model: Model) -> None:
    """Refuse a model that takes no images, a folder without a processor, and missing packages.

    Raises:
        RequestError: the model reads text alone, or pillow is not installed.
        CheckpointError: the folder has no processor, or a damaged one.
    """
    folder = model.checkpoint.folder
    if not _takes_images(model):
        raise RequestError(
            f"{folder}: {model.family} takes no images; give a vision-language model, or calibration text whose rows have no "
            "column 'images'"
        )
    if not any((folder / name).is_file() for name in FILES):
        raise CheckpointError(f"{folder}: has no {FILES[1]}, so images cannot be read for it; copy it from the model's source")
    if importlib.util.find_spec("PIL") is None:
        raise RequestError(f"{folder}: reading images needs the package pillow; pip install pillow")
    _check_files(folder)


def _takes_images(model: Model) -> bool:
    """Whether the class that transformers makes of the checkpoint takes images; of a folder's own class nobody knows."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    taken, config = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model.family), model.checkpoint.config
    names = config.get("architectures")
    if "auto_map" in config and not model.ragged:
        return True
    if model.ragged or not isinstance(names, list) or not names:
        return taken is not None and model.family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return taken is not None and names[0] in ([taken] if isinstance(taken, str) else taken)


def _check_files(folder: Path) -> None:
    for name in (*FILES, *FURTHER_FILES):
        if (folder / name).exists():
            read_json(folder / name, LARGEST_CONFIG_BYTES)
    check_files(folder)


def image_tokens(model: Model) -> list[int]:
    """Tokens in whose place the model puts images; [] for a model of text alone."""
    found = (model.checkpoint.config.get(key) for key in ("image_token_id", "image_token_index"))
    return [each for each in found if type(each) is int]


def open_processor(model: Model, trust_remote_code: bool = False) -> Any:
    """Open the stock processor of a checkpoint that `check_processor` took; no code in a ragged checkpoint's folder is run.

    Returns:
        What `AutoProcessor.from_pretrained` gives, if it takes images.

    Raises:
        CheckpointError: it cannot be made.
    """
    from transformers import AutoProcessor, ProcessorMixin

    from compresskit.checkpoint.stock import quiet

    folder = model.checkpoint.folder
    trusted = trust_remote_code and not model.ragged
    try:
        with quiet():
            found = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=trusted)
    except Exception as error:  # transformers raises errors of every kind
        raise CheckpointError(f"{folder}: no usable processor ({_reason(error)})") from error
    if not isinstance(found, ProcessorMixin):
        raise CheckpointError(f"{folder}: its {FILES[1]} makes no processor of images and text; restore it from its source")
    return found


def _reason(error: Exception) -> str:
    """What is wrong, and what to do: mostly a package is missing."""
    for package in ("torchvision", "num2words"):
        if isinstance(error, ImportError) and package in str(error).lower():
            return f"it needs the package {package}; pip install {package}"
    return f"{first_line(error)}; copy preprocessor_config.json and the tokenizer's files from the model's source"
