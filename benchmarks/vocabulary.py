"""A model with fewer tokens beside its source: tokens and loss of one text, counted per byte, and the logits of kept tokens.

    python benchmarks/vocabulary.py SOURCE TRIMMED --text FILE [--characters 60000] [--length 512]

Both tokenizers cut the same characters of FILE (.parquet with a column text, or .txt); each model scores its own tokens in
windows of LENGTH with stock transformers, in float32. Logits are compared on the first window of kept tokens alone. Prints a
JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.models.prunings import kept_channels


def text_of(path: Path) -> str:
    """The whole text of a file."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return "\n\n".join(parquet.read_table(path)["text"].to_pylist())
    return path.read_text(encoding="utf-8")


@torch.no_grad()
def scored(folder: str, text: str, length: int) -> dict[str, Any]:
    """Tokens, nats per token and per byte, and the perplexity of a token of the source's mean length."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, nats, scored_bytes = tokenizer(text, return_tensors="pt").input_ids[0], 0.0, 0
    for window in ids.split(length):
        if len(window) > 1:
            nats += float(cross_entropy(network(window[None]).logits[0, :-1], window[1:], reduction="sum"))
            scored_bytes += len(tokenizer.decode(window[1:]).encode())
    return {"tokens": len(ids), "nats_per_byte": nats / scored_bytes, "vocabulary": network.config.vocab_size}


@torch.no_grad()
def logit_difference(source: str, trimmed: str, text: str, length: int) -> float:
    """Largest difference of a kept token's logits on kept tokens, in units of the logits' standard deviation."""
    mask = json.loads((Path(trimmed) / "compresskit.json").read_text())["facts"]["kept_tokens"]
    kept = kept_channels(mask)
    number = {before: after for after, before in enumerate(kept)}
    ids = [token for token in AutoTokenizer.from_pretrained(source)(text).input_ids if token in number][:length]
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in (source, trimmed))
    before = old(torch.tensor([ids])).logits[..., kept]
    after = new(torch.tensor([[number[token] for token in ids]])).logits
    return float((before - after).abs().max() / before.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("trimmed")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--characters", type=int, default=60_000)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    text = text_of(arguments.text)[: arguments.characters]
    old, new = (scored(folder, text, arguments.length) for folder in (arguments.source, arguments.trimmed))
    difference = logit_difference(arguments.source, arguments.trimmed, text, arguments.length)
    ratio = math.exp((new["nats_per_byte"] - old["nats_per_byte"]) * len(text.encode()) / old["tokens"])
    print(json.dumps({"source": old, "trimmed": new, "perplexity_ratio": ratio, "logit_difference": difference}))


if __name__ == "__main__":
    main()
