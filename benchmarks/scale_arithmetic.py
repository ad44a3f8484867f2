"""How long the stages take on a large model: operations and bytes counted from its shapes, divided by the rates of a machine.

    python benchmarks/scale_arithmetic.py [--models 8B,70B] [--accelerators 1,8] [--windows 128] [--length 2048]
        [--half 4e14] [--single 4e13] [--double 3e13] [--cholesky 3e12] [--kernels 2e5] [--disk 3e9] [--sha256 1.5e9]
        [--link 1e11]
    python benchmarks/scale_arithmetic.py --config FOLDER --measure [--windows 4] [--length 256] [--stage "prune cfsp"]

Rates: operations a second of matrix products in 16 bits, in float32 and in float64, and of a Cholesky factorisation in
float64; small kernels that are started one after the other; bytes a second of the disk, of SHA-256, and between accelerators.
The defaults are assumptions about an accelerator of the H100's class, about half of what its maker states; put in those of
yours. `--measure` takes those of this machine's CPU instead, in processor time of one thread, and float32 for everything.
Passes over the text are those that the requests state (`passes()`), for prune, gptq and eora those of their walks, part by
part. A model is given by its config.json alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from compresskit import methods
from compresskit.evaluation.request import EvaluateOptions, EvaluateRequest
from compresskit.models.load import bind
from compresskit.models.model import Model
from compresskit.models.shapes import without_weights
from compresskit.quantization.error_feedback import ROWS_AT_ONCE
from compresskit.recovery.request import RecoverOptions, RecoverRequest
from compresskit.stages import Options
from compresskit.walk.cost import head_share

LLAMA = {"8B": (4096, 14336, 32, 32, 8), "70B": (8192, 28672, 80, 64, 8)}
"""Hidden size, FFN, blocks, heads, key-value heads of Llama 3.1."""
VOCABULARY = 128_256
PANELS = 17 / 32
"""Share of a symmetric matrix of second moments that is computed."""
SPARSITY, BITS, RANK, EPOCHS, EXAMPLES = 0.3, 3, 64, 8, 5_000
EXAMPLE_BYTES = 2_000
"""Of an instruction and its answer, about 500 tokens."""
SUBSPACE_STEPS, OVERSAMPLE = 11, 16
"""Of `leading_eigenvectors`."""
EIGENVECTORS = 9
"""Operations of a symmetric eigendecomposition are about 9 n^3."""
KERNELS_A_COLUMN = 6
"""Of the plain loop of quantization/panels.py; the Triton kernel, which no accelerator has run yet, takes one for a panel."""
STEPS_OF_MOMENTS = 8
"""Bytes of an entry of second moments that ranks add up."""


@dataclass
class Work:
    """Operations and bytes of a stage; `alone`: what every rank does by itself."""

    half: float = 0.0
    """Operations of forward (and backward) passes."""
    single: float = 0.0
    """Float32: second moments, rounding, products of the refit."""
    double: float = 0.0
    """Float64, shared: triangular solves, products of the low-rank pairs."""
    cholesky: float = 0.0
    """Float64 factorisations, by every rank alone."""
    kernels: float = 0.0
    """Small kernels one after the other: GPTQ's columns."""
    read: float = 0.0
    hashed: float = 0.0
    written: float = 0.0
    exchanged: float = 0.0
    """Bytes that a rank adds up or gives to all."""


@dataclass
class Rates:
    """Operations and bytes a second."""

    half: float = 4e14
    single: float = 4e13
    double: float = 3e13
    cholesky: float = 3e12
    kernels: float = 2e5
    disk: float = 3e9
    sha256: float = 1.5e9
    link: float = 1e11


@dataclass
class Shapes:
    """A model's blocks, all alike."""

    model: Model
    length: int

    def __post_init__(self) -> None:
        model = self.model
        positions = model.linear_sequence(0)
        self.blocks = model.block_count
        self.inputs = [[model.linear_shape(group[0])[1] for group in position] for position in positions]
        self.sizes = [sum(math.prod(model.linear_shape(name)) for group in position for name in group) for position in positions]
        self.groups = [
            (sum(model.linear_shape(name)[0] for name in group), model.linear_shape(group[0])[1])
            for position in positions for group in position
        ]  # fmt: skip
        """(rows, columns) of the linears that share their inputs."""
        self.linears = [model.linear_shape(name) for position in positions for group in position for name in group]
        self.core = 2.0 * self.length * self.inputs[1][0]
        """Operations of the attention itself for a token: causal, so half of the products with all positions."""

    @property
    def forward(self) -> float:
        """Operations of a token in all blocks."""
        return self.blocks * (2 * sum(self.sizes) + self.core)

    @property
    def bytes(self) -> float:
        """Of the weights, in 16 bits."""
        return 2.0 * self.model.parameters

    @property
    def moments(self) -> list[int]:
        """Sides of the matrices of second moments of a block."""
        return [side for position in self.inputs for side in position]


def collecting(shapes: Shapes) -> float:
    """Operations of a token in all blocks where each position is looked at after the edit of those before, and the advance."""
    attention, output, into, out = shapes.sizes
    first = 2 * attention + shapes.core  # the inputs of the attention's output
    second = 2 * (attention + output) + shapes.core  # the inputs of the feed-forward network; the attention is kept from here on
    return shapes.blocks * (first + second + 2 * into + 2 * (into + out))


def prune(shapes: Shapes, tokens: int) -> Work:
    attention, output, into, out = shapes.sizes
    hidden, width = shapes.inputs[2][0], shapes.inputs[3][0]
    kept = round(width * (1 - SPARSITY))
    walked = 2 * (attention + output) + shapes.core + 2 * into + 2 * (into + out) * (1 - SPARSITY)
    refit = 2 * hidden * (width - kept) * width
    return Work(
        half=tokens * (shapes.forward + shapes.blocks * walked),
        single=shapes.blocks * (tokens * 2 * PANELS * width**2 + refit),
        double=shapes.blocks * (2 * hidden * kept**2 + kept**2 * hidden),
        cholesky=shapes.blocks * kept**3 / 3,
        read=2 * shapes.bytes, hashed=shapes.bytes, written=shapes.bytes - 2 * SPARSITY * shapes.blocks * (into + out),
        exchanged=shapes.blocks * (PANELS * width**2 * STEPS_OF_MOMENTS + 4 * hidden * kept),
    )  # fmt: skip


def gptq(shapes: Shapes, tokens: int) -> Work:
    rounded = sum(2 * rows * columns**2 for rows, columns in shapes.linears)  # the errors passed on, and the energies
    packed = BITS / 16 * 2 * sum(shapes.sizes) * shapes.blocks
    return Work(
        half=tokens * collecting(shapes) + closing(shapes),
        single=shapes.blocks * (tokens * 2 * PANELS * sum(side**2 for side in shapes.moments) + rounded),
        cholesky=shapes.blocks * sum(side**3 / 3 for side in shapes.moments),
        kernels=shapes.blocks * sum(KERNELS_A_COLUMN * columns * -(-rows // ROWS_AT_ONCE) for rows, columns in shapes.groups),
        read=2 * shapes.bytes + packed, hashed=shapes.bytes,
        written=shapes.bytes - 2 * sum(shapes.sizes) * shapes.blocks + packed,
        exchanged=shapes.blocks * (
            PANELS * sum(side**2 for side in shapes.moments) * STEPS_OF_MOMENTS + 8 * sum(shapes.sizes)
        ),
    )  # fmt: skip


def eora(shapes: Shapes, tokens: int) -> Work:
    double, alone = 0.0, 0.0
    for rows, columns in shapes.linears:
        side = min(rows, columns)
        products = 2 * rows * columns**2 + (2 * rows**2 * columns if rows <= columns else 2 * rows * columns**2)
        double += products + SUBSPACE_STEPS * 2 * side**2 * (RANK + OVERSAMPLE) + 2 * 2 * rows * columns**2  # and two errors
    tall = {columns for rows, columns in shapes.linears if rows > columns}
    alone = sum(EIGENVECTORS * side**3 for side in tall)
    return Work(
        half=tokens * collecting(shapes) + closing(shapes),
        single=shapes.blocks * tokens * 2 * PANELS * sum(side**2 for side in shapes.moments),
        double=shapes.blocks * double, cholesky=shapes.blocks * alone,
        read=shapes.bytes + 3 * shapes.bytes * BITS / 16, hashed=shapes.bytes * (1 + BITS / 16),
        written=shapes.bytes * BITS / 16,
        exchanged=shapes.blocks * PANELS * sum(side**2 for side in shapes.moments) * STEPS_OF_MOMENTS,
    )  # fmt: skip


def closing(shapes: Shapes) -> float:
    """Two models over the four windows held back."""
    return 2 * 4 * shapes.length * shapes.forward * (1 + head_share(shapes.model))


def requested(shapes: Shapes, stage: str, windows: int) -> Work:
    """From a request's own `passes()`."""
    examples = shapes.model.checkpoint.folder / "examples.jsonl"
    model, length = shapes.model, shapes.length
    if stage == "evaluate":
        options = EvaluateOptions(windows=windows, sequence_length=length, against="source")
        passes, walks, written = EvaluateRequest(model, None, options).passes(), 2.0, 0.0
    elif stage == "recover lora":
        tuned = RecoverOptions(original="source", data=(str(examples),), sequence_length=length)
        method = methods.method_class("recover", "random")()
        passes, walks, written = RecoverRequest(method, model, Path("out"), tuned).passes(), 3.0, shapes.bytes
    else:
        found = methods.method_class("quantize", "apiq")(bits=BITS, epochs=EPOCHS)
        kind = methods.request_class("quantize", "apiq")
        request = kind(found, model, Path("out"), Options(calibration="builtin", samples=windows, sequence_length=length))
        passes, walks, written = request.passes(), 4.0, shapes.bytes * BITS / 16
    hashed = 0.0 if stage == "evaluate" else shapes.bytes
    return Work(half=passes * length * shapes.forward, read=walks * shapes.bytes, hashed=hashed, written=written)


def parts(work: Work, rates: Rates, ranks: int) -> dict[str, float]:
    """Seconds of each part. Reading and hashing go on beside the rest."""
    return {
        "forward": work.half / rates.half / ranks,
        "moments, rounding": work.single / rates.single / ranks,
        "solves": work.double / rates.double / ranks,
        "columns": work.kernels / rates.kernels / ranks,
        "factorisations": work.cholesky / rates.cholesky,
        "exchange": 2 * (ranks - 1) / ranks * work.exchanged / rates.link,
        "writing": work.written / rates.disk,
        "reading": work.read / rates.disk,
        "SHA-256": max(work.hashed, work.written) / rates.sha256,  # by threads of their own
    }


BESIDE = ("reading", "SHA-256")


def seconds(found: dict[str, float]) -> float:
    return max(sum(each for what, each in found.items() if what not in BESIDE), *(found[what] for what in BESIDE))


STAGES: dict[str, Callable[[Shapes, int, int], Work]] = {
    "prune cfsp": lambda shapes, windows, length: prune(shapes, windows * length),
    "quantize gptq": lambda shapes, windows, length: gptq(shapes, windows * length),
    "quantize apiq": lambda shapes, windows, length: requested(shapes, "quantize apiq", windows),
    "compensate eora": lambda shapes, windows, length: eora(shapes, windows * length),
    "recover lora": lambda shapes, windows, length: requested(shapes, "recover lora", windows),
    "evaluate": lambda shapes, windows, length: requested(shapes, "evaluate", windows),
}
ALONE = ("quantize apiq", "recover lora")
"""Stages whose default step leaves little to share: two windows; one micro-batch of 4,096 tokens."""


def llama(name: str, folder: Path) -> Path:
    hidden, ffn, blocks, heads, key_value_heads = LLAMA[name]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": key_value_heads,
        "vocab_size": VOCABULARY, "dtype": "bfloat16", "tie_word_embeddings": False, "max_position_embeddings": 131072,
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    lines = (
        {"instruction": f"{number} ", "output": f"{number} " * (EXAMPLE_BYTES // 5)} for number in range(1000, 1000 + EXAMPLES)
    )
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def measured_rates(file: Path) -> Rates:
    """Of this machine: processor time of one thread."""
    torch.set_num_threads(1)
    single, double = torch.rand(1536, 1536), torch.rand(1024, 1024, dtype=torch.float64)
    definite = double @ double.T + 1024 * torch.eye(1024, dtype=torch.float64)
    few, data, size = torch.rand(4), bytes(1 << 26), file.stat().st_size
    return Rates(
        half=2 * 1536**3 / _time(lambda: single @ single), single=2 * 1536**3 / _time(lambda: single @ single),
        double=2 * 1024**3 / _time(lambda: double @ double),
        cholesky=1024**3 / 3 / _time(lambda: torch.linalg.cholesky(definite)),
        kernels=4096 / _time(lambda: [few.add(1) for _ in range(4096)]), disk=size / _time(file.read_bytes),
        sha256=len(data) / _time(lambda: hashlib.sha256(data)), link=math.inf,
    )  # fmt: skip


def _time(work: Callable[[], object], rounds: int = 7) -> float:
    found = []
    for _ in range(rounds):
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return sorted(found)[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="8B,70B")
    parser.add_argument("--accelerators", default="1,8")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--config", type=Path, help="a folder with another model's config.json")
    parser.add_argument("--stage", default="")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--parts", action="store_true", help="seconds of each part, on one accelerator")
    for field in fields(Rates):
        parser.add_argument(f"--{field.name}", type=float, default=field.default)
    arguments = parser.parse_args()
    rates = Rates(**{field.name: getattr(arguments, field.name) for field in fields(Rates)})
    with tempfile.TemporaryDirectory() as temporary:
        names = arguments.models.split(",")
        folders = [arguments.config] if arguments.config else [llama(name, Path(temporary) / name) for name in names]
        if arguments.measure:
            rates = measured_rates(next(iter(arguments.config.glob("*.safetensors"))))
        for folder in folders:
            table(folder, rates, arguments)


def table(folder: Path, rates: Rates, arguments: argparse.Namespace) -> None:
    shapes = Shapes(bind(without_weights(folder, False), False), arguments.length)
    counts = [1] if arguments.measure else [int(each) for each in arguments.accelerators.split(",")]
    print(f"\n{folder.name}: {arguments.windows} windows of {arguments.length} tokens")
    print("rates: " + ", ".join(f"{field.name} {getattr(rates, field.name):.2g}" for field in fields(Rates)) + "\n")
    heads = ["stage", *(f"{what}, TFLOP" for what in ("forward", "float32", "float64", "factorised"))]
    heads += [f"{what}, GB" for what in ("read", "hashed", "written", "exchanged")]
    heads += [f"minutes on {count} (largest part)" for count in counts]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for stage, counted in STAGES.items():
        if arguments.stage and stage != arguments.stage:
            continue
        work = counted(shapes, arguments.windows, arguments.length)
        cells = [f"{each / 1e12:,.4g}" for each in (work.half, work.single, work.double, work.cholesky)]
        cells += [f"{each / 1e9:,.3g}" for each in (work.read, work.hashed + work.written, work.written, work.exchanged)]
        for count in counts:
            if count > 1 and stage in ALONE:
                cells.append("as on 1")
                continue
            found = parts(work, rates, count)
            cells.append(f"{seconds(found) / 60:.2g} ({max(found, key=found.__getitem__)})")
        print(f"| `{stage}` | " + " | ".join(cells) + " |", flush=True)
        if arguments.parts:
            print({what: round(each, 2) for what, each in parts(work, rates, 1).items()})


if __name__ == "__main__":
    main()
