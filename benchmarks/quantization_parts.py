"""What each part of ApiQ's training brings, in one block: the error of its output on windows seen and not seen.

    python benchmarks/quantization_parts.py --prefix QUANTISED --text FILE --bits 2 --blocks 5 [--rows NAME ...]

QUANTISED is the demo model after `quantize apiq` at the same bits: its blocks come before those that are trained, each by every
row anew. The error of a token is the squared error of the block's output over the output's own square; prints a JSON line
a row with the means over the windows that it is trained on and over others that it never sees.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.calibration.sources import TextRequest
from compresskit.calibration.windows import calibrate
from compresskit.checkpoint.source import DEMO, resolve
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.load import open_model
from compresskit.numerics.packed import Storage
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.apiq.method import ApiQ
from compresskit.walk.block import Block
from compresskit.walk.sequence import chosen_sequence, replace_weight
from compresskit.walk.walk import Walk

CPU, LENGTH = torch.device("cpu"), 512
ROWS: dict[str, dict[str, Any]] = {
    "start": {"epochs": 0},
    "defaults": {},
    "rounding rate 2": {"rounding_rate": 2.0},
    "rounding rate 0.5": {"rounding_rate": 0.5},
    "3 epochs": {"epochs": 3},
    "12 epochs": {"epochs": 12},
    **{f"norm rate {rate:g}": {"norm_rate": rate} for rate in (0.0, 0.25, 0.5, 2.0)},
    "clipping rate 0.5": {"clipping_rate": 0.5},
    "no clipping": {"clipping_rate": 1e-9},
    "nearest": {"rounding": "nearest"},
    "from rtn": {"start": "rtn"},
    "nearest from rtn": {"start": "rtn", "rounding": "nearest"},
    "absolute": {"error": "absolute"},
    "relative": {"error": "relative"},
    "float32": {"precision": "float32"},
    "rank 8": {"rank": 8},
    "rank 8 in 8 bits": {"rank": 8, "adapter_bits": 8},
    **{f"rank 8, learning rate {rate:g}": {"rank": 8, "learning_rate": rate} for rate in (2e-3, 5e-3)},
    **{f"activation {w:g}": {"saliency": "activation", "saliency_weight": w} for w in (0.01, 0.1, 1.0)},
}


def relative_error(outputs: list[Tensor], targets: list[Tensor]) -> float:
    errors = [((o - t).square().sum(-1) / t.square().sum(-1)).flatten() for o, t in zip(outputs, targets, strict=True)]
    return float(torch.cat(errors).mean())


@torch.no_grad()
def outputs(block: Block, hidden: list[Tensor]) -> list[Tensor]:
    block.remembered.clear()
    return [block.run(each) for each in hidden]


def measure(blocks: tuple[Block, Block], stages: Any, settings: dict[str, Any], bits: int, samples: int) -> dict[str, float]:
    """Train the second block, dense as it is, on the first windows; both are left as they were."""
    original, compressed = blocks
    model_inputs, inputs = list(original.hidden), list(compressed.hidden)
    weights = {name: compressed.linear(name).weight.detach().clone() for stage in stages for group in stage for name in group}
    vectors = {name: each.detach().clone() for name, each in compressed.module.named_parameters() if each.ndim == 1}
    method = ApiQ(bits=bits, **{"rank": 0, **settings})
    for block, hidden in ((original, model_inputs), (compressed, inputs)):
        block.take_inputs(hidden[:samples])
        block.advanced = False
    started = time.monotonic()
    factors = torch.float8_e4m3fn if method.has_small_factors else torch.float16
    storage = Storage(Scheme(bits, 64, False), torch.float16, method.rank or 0, factors, dict.fromkeys(vectors, torch.float32))
    original.advance()
    method.quantize_block(compressed, original.hidden, stages, storage, {})
    seconds = time.monotonic() - started
    seen = relative_error(outputs(compressed, inputs[:samples]), outputs(original, model_inputs[:samples]))
    others = relative_error(outputs(compressed, inputs[samples:]), outputs(original, model_inputs[samples:]))
    for block, hidden in ((original, model_inputs), (compressed, inputs)):
        block.take_inputs(hidden)
        block.remembered.clear()
    for name, weight in weights.items():
        replace_weight(compressed.linear(name), weight)
    with torch.no_grad():
        for name, vector in vectors.items():
            compressed.module.get_parameter(name).copy_(vector)
    return {"seen": seen, "not_seen": others, "seconds": round(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=Path, required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--blocks", type=int, nargs="+", default=[5])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--unseen", type=int, default=12)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="; ".join(ROWS))
    arguments = parser.parse_args()
    model, prefix = open_model(resolve(DEMO)), open_model(arguments.prefix)
    count, where = arguments.samples + arguments.unseen, Where(CPU, torch.float32)
    tokens = calibrate(TextRequest(arguments.text, count, LENGTH), model, where).tokens
    finished = {index: prefix for index in range(model.block_count) if index not in arguments.blocks}
    walks = Walk(model, tokens, where, 1), Walk(model, tokens, where, 1).resumed(finished)
    for original, compressed in zip(*walks, strict=True):
        if original.index not in arguments.blocks:
            continue
        stages = chosen_sequence(model, original.index, model.linears)
        for name in arguments.rows:
            found = measure((original, compressed), stages, ROWS[name], arguments.bits, arguments.samples)
            print(json.dumps({"bits": arguments.bits, "block": original.index, "row": name} | found), flush=True)
        original.advanced = compressed.advanced = False
        walks[1].release(compressed)
        meta.fill(prefix, walks[1].network, compressed.name, CPU, torch.float32)
        if original.index == max(arguments.blocks):
            return


if __name__ == "__main__":
    main()
