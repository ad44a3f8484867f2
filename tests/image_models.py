"""Tiny vision-language checkpoints with stock processors, and files whose rows have images."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import families
from conftest import TEXT
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Processor, LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}:{% for c in m.content %}"
    "{% if c.type == 'image' %}@{% else %}{{ c.text }}{% endif %}{% endfor %}</s>{% endfor %}"
)
SIDE = 28
WORDS = TEXT.split()


def tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    """Bytes of plain text are tokens of their own; special tokens have the ids that the tiny configurations give them."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in [*map(chr, range(33, 127)), "Ġ", "Ċ"]:
        vocabulary[symbol] = len(vocabulary)
    made = Tokenizer(models.BPE(vocabulary | special, [], unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True) for name in ("<pad>", "<s>", "</s>", *special)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, extra_special_tokens=named, **names)


def gemma3(folder: Path) -> Path:
    """With a chat template; four tokens an image."""
    words = tokenizer({"<boi>": 120, "<eoi>": 121, "<img>": 122}, boi_token="<boi>", eoi_token="<eoi>", image_token="<img>")
    images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    families.build("gemma3", folder)
    Gemma3Processor(images, words, chat_template=TEMPLATE.replace("@", "<boi>"), image_seq_length=4).save_pretrained(folder)
    return folder


def llava(folder: Path) -> Path:
    """Without a chat template; four tokens an image."""
    words = tokenizer({"<image>": 120}, image_token="<image>")
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    families.build("llava", folder)
    processor = LlavaProcessor(images, words, patch_size=14, vision_feature_select_strategy="default")
    processor.num_additional_image_tokens = 1
    processor.save_pretrained(folder)
    return folder


MODELS = {"gemma3": gemma3, "llava": llava}


def picture(seed: int, form: str = "PNG") -> bytes:
    """A random image of few colours, as a file."""
    chance = random.Random(seed)
    made = Image.new("RGB", (chance.randint(20, 60), chance.randint(20, 60)), tuple(chance.randrange(256) for _ in range(3)))
    made.paste(tuple(chance.randrange(256) for _ in range(3)), (5, 5, 15, 18))
    data = io.BytesIO()
    made.save(data, form)
    return data.getvalue()


def sentence(seed: int, words: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def rows(images: int = 12, texts: int = 40) -> list[dict[str, Any]]:
    """Rows with one or two images and a short text, then rows of text."""
    with_images = [{"text": sentence(i, 3), "images": [f"pictures/{i}-{j}.png" for j in range(1 + i % 2)]} for i in range(images)]
    return [*with_images, *({"text": sentence(100 + i, 30), "images": []} for i in range(texts))]


def json_file(folder: Path, found: list[dict[str, Any]] | None = None) -> Path:
    """A .jsonl file beside its images."""
    found = rows() if found is None else found
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for name in {name for row in found for name in row["images"] if isinstance(name, str) and name.startswith("pictures/")}:
        (folder / name).write_bytes(picture(sum(name.encode())))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


def parquet_file(file: Path) -> Path:
    """The same rows as Hugging Face data sets store them."""
    import pyarrow
    from pyarrow import parquet

    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [[{"bytes": picture(sum(name.encode())), "path": name} for name in row["images"]] for row in rows()]
    table = {"text": [row["text"] for row in rows()], "images": pyarrow.array(images, pyarrow.list_(image))}
    parquet.write_table(pyarrow.table(table), file, row_group_size=7)
    return file
