"""Windows with images: a row's images and text as the checkpoint's own processor writes them, filled up with further text.

Windows keep one length. A sample shorter than a window is followed by text of rows whose images were not drawn, and a longer
one is left out; the description counts them. Where a file has fewer rows with images than windows, the others are text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compresskit.calibration.files import ROW_SEPARATOR
from compresskit.calibration.image_rows import Row, Share, opened, read_rows, stored_images
from compresskit.calibration.sources import FileSource
from compresskit.calibration.tokens import encode
from compresskit.checkpoint.small_files import first_line
from compresskit.checkpoint.stock import quiet
from compresskit.errors import CalibrationError
from compresskit.models.model import Model
from compresskit.models.processor import image_tokens, open_processor

Inputs = dict[str, Tensor]
"""What a model is given beside the tokens, by the name of its argument."""
BY_TOKEN = ("token_type_ids", "mm_token_type_ids")
"""Arguments with a number for each token; 0 is text."""
ROWS_AT_ONCE = 128
"""Rows whose images are read together."""


class Sample(NamedTuple):
    """A row as the processor writes it."""

    tokens: Tensor
    """(length,) int64"""
    inputs: Inputs


class Drawn(NamedTuple):
    """Rows with images that were drawn."""

    samples: dict[int, Sample]
    """By the number of the row, in drawing order."""
    longer: list[tuple[int, str]]
    """(length, place) of those that were too long."""


def image_windows(
    share: Share, model: Model, length: int, seed: int, trust_remote_code: bool
) -> tuple[tuple[Tensor, str], dict[bytes, Inputs]]:
    """Draw windows of a file whose rows have images; the last `share.text_only` are text.

    Returns:
        ((the windows (share.windows, length) int64, a description), what the model is given beside the tokens of a window).

    Raises:
        CalibrationError: a row cannot be read, no sample fits into a window, or the text is too short to fill them.
        CheckpointError: the folder holds no usable processor.
    """
    assert isinstance(share.source, FileSource)
    path, generator = share.source.path, torch.Generator().manual_seed(seed)
    rows = read_rows(path, share.source.column)
    processor = open_processor(model, trust_remote_code)
    drawn = _draw(share, rows, (processor, length), generator)
    rest = [row.text for number, row in enumerate(rows) if number not in drawn.samples and row.text]
    ids = encode(model.checkpoint.folder, ROW_SEPARATOR.join(rest), special_tokens=False, trust_remote_code=trust_remote_code)
    text = torch.tensor(ids, dtype=torch.int64)
    # Texts hold placeholders of images that were not drawn.
    text = text[~torch.isin(text, torch.tensor(image_tokens(model), dtype=torch.int64))]
    described = f"{path.name}: {len(drawn.samples)} with images and {share.windows - len(drawn.samples)} of text"
    described += f", {len(drawn.longer)} longer samples left out" if drawn.longer else ""
    windows, images = _filled(drawn, text, (share.windows, length), generator, str(path))
    order = torch.cat([
        torch.randperm(share.windows - share.text_only, generator=generator),
        torch.arange(share.windows - share.text_only, share.windows),
    ])  # fmt: skip
    return (windows[order], described), images


def _draw(share: Share, rows: list[Row], how: tuple[Any, int], generator: torch.Generator) -> Drawn:
    """Draw rows with images until there are enough that fit into a window. `how`: the processor, the window's length."""
    assert isinstance(share.source, FileSource)
    path, (processor, length) = share.source.path, how
    wanted, drawn = share.windows - share.text_only, Drawn({}, [])
    order = [number for number in torch.randperm(len(rows), generator=generator).tolist() if rows[number].images]
    while order and len(drawn.samples) < wanted:
        count = min(ROWS_AT_ONCE, wanted - len(drawn.samples))
        part, order = order[:count], order[count:]
        stored = stored_images(path, rows, part)
        for number in part:
            found = _sample(rows[number], [opened(rows[number].place, each, path.parent) for each in stored[number]], processor)
            if len(found.tokens) > length:
                drawn.longer.append((len(found.tokens), rows[number].place))
            else:
                drawn.samples[number] = found
    if not drawn.samples:
        if not drawn.longer:
            raise CalibrationError(f"{path}: no row has an image; give rows with images, or leave out the column 'images'")
        least, place = min(drawn.longer)
        raise CalibrationError(
            f"{place}: its text and images are {least:,} tokens, and no sample of the file is shorter; raise --sequence-length "
            f"from {length} to {least}, or make the images smaller"
        )
    return drawn


def _sample(row: Row, images: list[Any], processor: Any) -> Sample:
    """The tokens and the inputs that the processor makes of a row; raises CalibrationError if it takes no such row."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": row.text}]
    try:
        with quiet():
            if processor.chat_template:
                text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            else:
                text = str(processor.image_token) * len(images) + row.text
            start = processor.tokenizer.bos_token
            special = not (start and text.startswith(start))
            made = dict(processor(images=[images], text=[text], return_tensors="pt", add_special_tokens=special))
        tokens = made.pop("input_ids")[0].to(torch.int64)
    except Exception as error:  # a processor, and the template in it, may raise whatever they call raises
        raise CalibrationError(
            f"{row.place}: the model's processor does not take it ({first_line(error)}); mend the row"
        ) from error
    made.pop("attention_mask", None)
    return Sample(tokens, {name: value.contiguous() for name, value in made.items() if isinstance(value, Tensor)})


def _filled(
    drawn: Drawn, text: Tensor, shape: tuple[int, int], generator: torch.Generator, path: str
) -> tuple[Tensor, dict[bytes, Inputs]]:
    """The samples filled up with text (tokens,), then windows of text alone; and the inputs by the tokens of a window."""
    count, length = shape
    of_text, cuts = count - len(drawn.samples), len(text) // length
    needed = count * length - sum(len(sample.tokens) for sample in drawn.samples.values())
    if len(text) < needed or cuts < of_text:
        raise CalibrationError(
            f"{path}: {len(text):,} tokens of text beside the samples with images, {needed:,} are needed to fill {count} windows "
            f"of {length}; add rows of text, or lower --samples or --sequence-length"
        )
    order = torch.randperm(cuts, generator=generator)
    pieces = text[: cuts * length].view(cuts, length)[order]
    filling, taken = torch.cat([pieces[of_text:].flatten(), text[cuts * length :]]), 0
    windows: list[Tensor] = []
    images: dict[bytes, Inputs] = {}
    for sample in drawn.samples.values():
        missing = length - len(sample.tokens)
        window = torch.cat([sample.tokens, filling[taken : taken + missing]])
        taken += missing
        key, inputs = window.numpy().tobytes(), {name: _padded(name, value, missing) for name, value in sample.inputs.items()}
        if key in images and any(not torch.equal(images[key][name], value) for name, value in inputs.items()):
            raise CalibrationError(f"{path}: two samples have other images and the same tokens; add 1 to --sequence-length")
        windows.append(window)
        images[key] = inputs
    return torch.cat([torch.stack(windows), pieces[:of_text]]), images


def _padded(name: str, value: Tensor, missing: int) -> Tensor:
    return torch.nn.functional.pad(value, (0, missing)) if name in BY_TOKEN else value


def images_digest(tokens: str, images: Mapping[bytes, Inputs]) -> str:
    """Hexadecimal SHA-256 of the digest of the tokens and of all inputs beside them; the former where there are none."""
    if not images:
        return tokens
    found = hashlib.sha256(tokens.encode())
    for window, inputs in sorted(images.items()):
        found.update(window)
        for name, value in sorted(inputs.items()):
            found.update(repr((name, tuple(value.shape), str(value.dtype))).encode() + value.numpy().tobytes())
    return found.hexdigest()
