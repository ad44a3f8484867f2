"""How much of what a compression lost a fine-tuning won back, on three texts: one JSON line a checkpoint.

    python benchmarks/recovery_share.py --data DATA --dense demo:smollm2-135m --compressed PRUNED RECOVERED...

DATA holds wikitext2-test.parquet, tasks/lambada.jsonl and instructions-*.jsonl. Loss: nats a token, over all tokens of
wikitext windows and LAMBADA passages, over response tokens of instructions that `recover` holds back by default with
the same --pool and --seed. Share: (compressed - recovered) / (compressed - dense).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import pyarrow.parquet

from compresskit.calibration import encode
from compresskit.checkpoint import source
from compresskit.machine.device import choose_device
from compresskit.machine.precision import Precision, matrix_products
from compresskit.models.load import open_model, with_adapter
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recovery.data.duplicates import drop_duplicates
from compresskit.recovery.data.encoding import Sample, encode_samples
from compresskit.recovery.data.held_back import hold_back, mean_losses
from compresskit.recovery.data.instructions import Instruction, read_instructions
from compresskit.recovery.forward import open_walk

HELD_BACK = 0.05


def plain(rows: list[list[int]]) -> list[Sample]:
    return [Sample(Instruction(i, "text", [], "", ""), row, 1) for i, row in enumerate(rows)]


def held_back(data: Path, folder: Path, pool: int, length: int, seed: int) -> list[Sample]:
    """As `recover --pool --seed` holds back of the same files, in their sorted order."""
    reading = read_instructions(sorted(data.glob("instructions-*.jsonl")))
    kept, _ = drop_duplicates([sample.text for sample in reading.samples])
    if pool and pool < len(kept):
        kept = sorted(random.Random(seed).sample(kept, pool))
    reading.samples = [reading.samples[i] for i in kept]
    return hold_back(encode_samples(reading, open_tokenizer(folder), length), HELD_BACK, seed)[1]


def texts(data: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, list[Sample]]:
    length = arguments.sequence_length
    lines = pyarrow.parquet.read_table(data / "wikitext2-test.parquet")["text"].to_pylist()
    ids = encode(folder, "".join(lines), False)
    windows = [ids[i * length : (i + 1) * length] for i in range(min(arguments.windows, len(ids) // length))]
    rows = [json.loads(line)["text"] for line in (data / "tasks" / "lambada.jsonl").read_text().splitlines()]
    tokenizer = open_tokenizer(folder)
    passages = [tokenizer(row, add_special_tokens=False)["input_ids"][:length] for row in rows[: arguments.passages]]
    held = held_back(data, folder, arguments.pool, length, arguments.seed)[: arguments.responses] if arguments.responses else []
    return {"wikitext": plain(windows), "lambada": plain(passages), "responses": held}


def losses(folder: Path, found: dict[str, list[Sample]], precision: Precision = "float32") -> dict[str, float]:
    model = with_adapter(open_model(folder), None)
    walk = open_walk(model, choose_device("auto", "float32", model.checkpoint.dtypes))
    with matrix_products(walk.device, precision):
        return {name: mean_losses(walk, samples, None)["loss_by_token"] for name, samples in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--dense", default="demo:smollm2-135m")
    parser.add_argument("--compressed", required=True)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--passages", type=int, default=500)
    parser.add_argument("--responses", type=int, default=10_000)
    parser.add_argument("--pool", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("recovered", nargs="*")
    arguments = parser.parse_args()
    folders = [source.resolve(each) for each in (arguments.dense, arguments.compressed, *arguments.recovered)]
    found = texts(arguments.data, folders[0], arguments)
    dense, compressed = (losses(folder, found) for folder in folders[:2])
    print(json.dumps({"folder": arguments.dense, "losses": dense}), flush=True)
    print(json.dumps({"folder": arguments.compressed, "losses": compressed}), flush=True)
    for folder in folders[2:]:
        after = losses(folder, found)
        shares = {name: (compressed[name] - after[name]) / (compressed[name] - dense[name]) for name in after}
        line = {"folder": str(folder), "losses": after, "shares": shares, "mean_share": sum(shares.values()) / len(shares)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
