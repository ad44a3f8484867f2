"""THE tables: stage -> what runs it; stage -> name of a method -> where its class is. A new method is a file and a line here.

Loads no torch, no pydantic and no method: `compresskit --help` and `compresskit methods` answer from this table alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compresskit.errors import RequestError, near_miss


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    target: str
    """"module:Class"."""
    paper: str
    summary: str


@dataclass(frozen=True)
class Stage:
    """One line of the table of stages; targets are "module:name"."""

    run: str
    """function(method, source, out, options, quiet) -> what `--json` prints."""
    options: str
    """Class of the settings besides the method's."""
    summary: str


STAGES: dict[str, Stage] = {
    "prune": Stage(
        "compresskit.pipeline.pruning:prune",
        "compresskit.stages:Options",
        "Remove FFN channels: a smaller, faster dense model.",
    ),
    "quantize": Stage(
        "compresskit.pipeline.quantization:quantize",
        "compresskit.stages:Options",
        "Store the weights in few bits.",
    ),
    "recover": Stage(
        "compresskit.pipeline.recovery:recover",
        "compresskit.recover.contract:RecoverOptions",
        "Fine-tune a compressed model on the data that repairs it.",
    ),
}
"""A method whose work is not its stage's has a line of its own, under "stage method"."""

METHODS: dict[str, dict[str, Entry]] = {
    "prune": {
        "cfsp": Entry("compresskit.prune.cfsp:CFSP", "arXiv 2409.13199", "Coarse-to-fine activation importance (recommended)."),
        "flap": Entry("compresskit.prune.flap:FLAP", "arXiv 2312.11983", "Fluctuation of activations, with an output bias."),
        "wanda-sp": Entry("compresskit.prune.wanda_sp:WandaSP", "arXiv 2306.11695", "Weights times input norms."),
        "magnitude": Entry("compresskit.prune.magnitude:Magnitude", "arXiv 1608.08710", "Norm of the weights alone."),
        "random": Entry("compresskit.prune.random:Random", "", "Channels drawn by chance: the floor to compare with."),
    },
    "quantize": {
        "apiq": Entry(
            "compresskit.quantize.apiq:ApiQ",
            "arXiv 2402.05147",
            "Rounding, clipping and a low-rank pair trained block by block (recommended).",
        ),
        "gptq": Entry("compresskit.quantize.gptq:GPTQ", "arXiv 2210.17323", "Rounding with error feedback, column by column."),
        "rtn": Entry("compresskit.quantize.rtn:RTN", "", "Round to nearest: needs no text, the floor to compare with."),
        "nf4": Entry("compresskit.quantize.nf4:NF4", "arXiv 2305.14314", "4 bits in bitsandbytes' own format; needs no text."),
    },
    "recover": {
        "paser": Entry(
            "compresskit.recover.paser:Paser",
            "arXiv 2502.12594",
            "What the compressed model lost, per cost (recommended).",
        ),
        "random": Entry("compresskit.recover.random:Random", "", "Samples drawn by chance: the floor to compare with."),
        "full": Entry("compresskit.recover.full:Full", "", "All samples."),
        "dsir": Entry("compresskit.recover.dsir:DSIR", "arXiv 2302.03169", "Importance resampling of hashed n-grams."),
        "zip-fit": Entry("compresskit.recover.zip_fit:ZipFit", "arXiv 2410.18194", "Alignment under gzip."),
        "kmeans": Entry("compresskit.recover.kmeans:KMeans", "arXiv 2409.11378", "Diversity: alike from every cluster."),
    },
}


def entry(stage: str, name: str) -> Entry:
    """The table's line for a method; RequestError with the near miss where there is none."""
    known = METHODS[stage]
    if name not in known:
        raise RequestError(f"{stage}: no method {name!r}; there are {', '.join(known)}.{near_miss(name, known)}")
    return known[name]


def method_class(stage: str, name: str) -> type[Any]:
    """Import the class of a method."""
    found: type[Any] = _load(entry(stage, name).target)
    return found


def name_of(stage: str, method: object) -> str:
    """The name under which the table lists a method's class."""
    target = f"{type(method).__module__}:{type(method).__name__}"
    return next(name for name, found in METHODS[stage].items() if found.target == target)


def stage_of(stage: str, method: str) -> Stage:
    """The line of a method: its own, or its stage's."""
    return STAGES.get(f"{stage} {method}", STAGES[stage])


def runner(stage: str, method: str) -> Callable[..., dict[str, Any]]:
    """Import what runs a method."""
    found: Callable[..., dict[str, Any]] = _load(stage_of(stage, method).run)
    return found


def options_class(stage: str, method: str) -> type[Any]:
    """Import the class of the settings besides the method's."""
    found: type[Any] = _load(stage_of(stage, method).options)
    return found


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
