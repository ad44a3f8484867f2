"""Whether `paser` finds a capability that was taken away on purpose: one JSON line, the share of every cluster.

    python benchmarks/recovery_damage.py --data DATA --work FOLDER --lost instructions-nc-alpaca-zh.jsonl

Of the dense model the embeddings of tokens that stand almost only in the file `--lost` are set to zero: the model can then
neither read nor say what that file needs. `recover paser --select-only` chooses from all instructions-*.jsonl of DATA.
`found` tells whether the cluster that holds most of that file got the largest part of the budget.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from compresskit.checkpoint import source
from compresskit.checkpoint.reader import open_checkpoint
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recovery.data.encoding import encode_samples
from compresskit.recovery.data.instructions import read_instructions
from compresskit.recovery.options import RecoverOptions
from compresskit.recovery.run import recover
from compresskit.recovery.selection.paser import Paser

EMBEDDINGS = "model.embed_tokens.weight"
OWN_SHARE = 0.9
"""Tokens lose their embedding of whose occurrences at least this share is in the file."""
OFTEN = 5
"""Occurrences below which a token is left alone."""


def own_tokens(files: list[Path], lost: str, folder: Path, length: int) -> torch.Tensor:
    """Tokens that stand almost only in the file of this name, in its prompts and its responses: (tokens,) int64."""
    counts = torch.zeros(2, json.loads((folder / "config.json").read_text())["vocab_size"], dtype=torch.int64)
    tokenizer = open_tokenizer(folder)
    for file in files:
        for sample in encode_samples(read_instructions([file]), tokenizer, length):
            counts[int(file.name == lost)] += torch.bincount(torch.tensor(sample.tokens), minlength=counts.shape[1])
    return ((counts[1] >= OFTEN) & (counts[1] >= OWN_SHARE * counts.sum(dim=0))).nonzero()[:, 0]


def damage(folder: Path, out: Path, tokens: torch.Tensor) -> None:
    """A copy of the checkpoint whose embeddings of these tokens are zero."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(folder, out)
    for file in open_checkpoint(out).files:
        tensors = load_file(file)
        if EMBEDDINGS in tensors:
            tensors[EMBEDDINGS][tokens] = 0
            save_file(tensors, file, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--lost", default="instructions-nc-alpaca-zh.jsonl")
    parser.add_argument("--pool", type=int, default=800)
    parser.add_argument("--clusters", type=int, default=0)
    parser.add_argument("--budget", type=float, default=0.02, help="small: a cluster gives no more than it has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequence-length", type=int, default=256)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = sorted(arguments.data.glob("instructions-*.jsonl"))
    folder = source.resolve("demo:smollm2-135m")
    tokens = own_tokens(files, arguments.lost, folder, arguments.sequence_length)
    damage(folder, arguments.work / "damaged", tokens)
    options = RecoverOptions(
        original=str(folder), data=tuple(map(str, files)), pool=arguments.pool, seed=arguments.seed, select_only=True,
        sequence_length=arguments.sequence_length, overwrite=True,
    )  # fmt: skip
    result = recover(
        Paser(clusters=arguments.clusters, budget=arguments.budget),
        str(arguments.work / "damaged"),
        arguments.work / "chosen",
        options,
    )
    clusters: list[dict[str, Any]] = result["clusters"]
    total = sum(cluster["budget"] for cluster in clusters)
    names = {sample.source for sample in read_instructions([arguments.data / arguments.lost]).samples}
    lost = max(clusters, key=lambda cluster: sum(cluster["sources"].get(name, 0) for name in names))
    found = lost["budget"] == max(cluster["budget"] for cluster in clusters)
    shares = [cluster | {"share": round(cluster["budget"] / total, 3)} for cluster in clusters]
    print(json.dumps({"lost": arguments.lost, "tokens": len(tokens), "found": found, "clusters": shares}))


if __name__ == "__main__":
    main()
