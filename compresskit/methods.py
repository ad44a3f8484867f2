"""THE tables of stages and methods: where each stage's runner and each method's class is. A new method is a file and a line.

Loads no torch, no pydantic and no method: `compresskit --help` and `compresskit methods` answer from this table alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compresskit.errors import RequestError, near_miss

PACKAGE = "compresskit"


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    target: str
    """"module:Class" inside this package."""
    paper: str
    summary: str


@dataclass(frozen=True)
class Stage:
    """One line of the table of stages; targets are "module:name" inside this package."""

    run: str
    """function(method, source, out, options, quiet) -> what `--json` prints."""
    options: str
    """Class of the settings besides the method's."""
    summary: str
    takes: str = "any"
    """dense: no low-bit model; any."""
    gives: str = "any"
    """dense, low-bit, any; report: no model, and run is function(source, options, quiet); file: one file, no folder."""
    several: bool = False
    """Whether it takes several sources."""
    request: str = ""
    """Class of the stage's request, which answers `plan`; empty if sizes depend on the data."""


_EXPERTS = Stage(
    "pruning.experts.run:remove_experts",
    "stages:Options",
    "Remove experts: a smaller dense model, as fast.",
    takes="dense",
    gives="dense",
    request="pruning.experts.request:ExpertsRequest",
)

STAGES: dict[str, Stage] = {
    "prune": Stage(
        "pruning.run:prune",
        "stages:Options",
        "Remove FFN channels: a smaller, faster dense model.",
        takes="dense",
        gives="dense",
        request="pruning.request:PruneRequest",
    ),
    "prune depth": Stage(
        "pruning.depth.run:remove",
        "stages:Options",
        "Remove whole blocks: a smaller, faster dense model.",
        takes="dense",
        gives="dense",
        request="pruning.depth.request:DepthRequest",
    ),
    **{f"prune {name}": _EXPERTS for name in ("reap", "m-smoe", "ream", "frequency", "random-experts")},
    "prune vocabulary": Stage(
        "pruning.vocabulary.run:trim",
        "pruning.vocabulary.method:VocabularyOptions",
        "Remove tokens that a text never needs.",
    ),
    "quantize": Stage(
        "quantization.run:quantize",
        "stages:Options",
        "Store the weights in few bits.",
        takes="dense",
        gives="low-bit",
        request="quantization.request:QuantizeRequest",
    ),
    "compensate": Stage(
        "compensation.run:compensate",
        "compensation.request:CompensateOptions",
        "Repair a compressed model by a low-rank adapter, without training.",
        request="compensation.request:CompensateRequest",
    ),
    "quantize compeft": Stage(
        "task_vectors.compress:compress",
        "task_vectors.request:TernaryOptions",
        "Store what fine-tuning added as signs and one scale.",
    ),
    "merge": Stage(
        "task_vectors.merge:merge",
        "task_vectors.request:MergeOptions",
        "Make several task vectors one.",
        several=True,
    ),
    "recover": Stage(
        "recovery.run:recover",
        "recovery.options:RecoverOptions",
        "Fine-tune a compressed model on the data that repairs it.",
        request="recovery.request:RecoverRequest",
    ),
    "evaluate": Stage(
        "evaluation.run:evaluate",
        "evaluation.request:EvaluateOptions",
        "Measure a model: perplexity, size, speed and tasks, alone or against the one it was made from.",
        gives="report",
        request="evaluation.request:EvaluateRequest",
    ),
    "export": Stage(
        "exporting.run:export",
        "exporting.request:ExportOptions",
        "Write a model, or an adapter, as one file for other runtimes.",
        gives="file",
    ),
    "search": Stage(
        "searching.run:search",
        "searching.options:SearchOptions",
        "Choose bits and groups for every part of a model, by measured loss, and store it so.",
        takes="dense",
        gives="low-bit",
        request="searching.request:SearchRequest",
    ),
    "pack": Stage(
        "archiving.run:pack",
        "archiving.request:PackOptions",
        "Pack a folder without loss into one smaller file, for shipping and archives.",
        gives="file",
    ),
    "expand": Stage(
        "task_vectors.expand:expand",
        "task_vectors.request:ExpandOptions",
        "Make a packed folder again, or a normal adapter or checkpoint of a ternary task vector.",
    ),
}
"""A method with its own runner has a separate line under "stage method"; evaluate, search, pack and expand have no methods."""

METHODS: dict[str, dict[str, Entry]] = {
    "prune": {
        "cfsp": Entry("pruning.cfsp:CFSP", "arXiv 2409.13199", "Coarse-to-fine activation importance (recommended)."),
        "flap": Entry("pruning.flap:FLAP", "arXiv 2312.11983", "Fluctuation of activations, with an output bias."),
        "wanda-sp": Entry("pruning.wanda_sp:WandaSP", "arXiv 2306.11695", "Weights times input norms."),
        "magnitude": Entry("pruning.magnitude:Magnitude", "arXiv 1608.08710", "Norm of the weights alone."),
        "depth": Entry("pruning.depth.method:Depth", "arXiv 2505.02819", "Whole blocks removed, what they did folded in."),
        "reap": Entry("pruning.experts.reap:REAP", "arXiv 2510.13999", "Experts removed that add least where they are chosen."),
        "m-smoe": Entry("pruning.experts.m_smoe:MSMoE", "arXiv 2310.01334", "Experts merged that the router treats alike."),
        "ream": Entry("pruning.experts.ream:REAM", "arXiv 2604.04356", "Experts merged whose gated outputs are alike."),
        "frequency": Entry("pruning.experts.frequency:Frequency", "", "Experts removed that the fewest tokens chose."),
        "random-experts": Entry(
            "pruning.experts.random:RandomExperts", "", "Experts drawn by chance: the floor to compare with."
        ),
        "vocabulary": Entry(
            "pruning.vocabulary.method:Vocabulary", "", "Tokens that a text never needs removed, rows with them."
        ),
        "random": Entry("pruning.random:Random", "", "Channels drawn by chance: the floor to compare with."),
    },
    "quantize": {
        "apiq": Entry(
            "quantization.apiq.method:ApiQ",
            "arXiv 2402.05147",
            "Rounding, clipping and a low-rank pair trained block by block (recommended).",
        ),
        "gptq": Entry("quantization.gptq:GPTQ", "arXiv 2210.17323", "Rounding with error feedback, column by column."),
        "rtn": Entry("quantization.rtn:RTN", "", "Round to nearest: needs no text, the floor to compare with."),
        "compeft": Entry(
            "task_vectors.compeft:ComPEFT",
            "arXiv 2311.13171",
            "Task vectors (adapters, or checkpoints with --base) as signs and one scale.",
        ),
        "nf4": Entry("quantization.nf4:NF4", "arXiv 2305.14314", "4 bits in bitsandbytes' own format; needs no text."),
    },
    "compensate": {
        "eora": Entry("compensation.eora:EoRA", "arXiv 2410.21271", "The least output error (recommended)."),
        "act": Entry("compensation.act:Act", "arXiv 2410.21271", "Weight error scaled by the inputs' mean sizes."),
        "corda": Entry("compensation.corda:CorDA", "arXiv 2406.05223", "Splits weights: a pair to fine-tune, and a rest."),
        "svd": Entry("compensation.svd:SVD", "arXiv 2303.08302", "Weight error as it is; needs no text."),
    },
    "merge": {
        "ties": Entry(
            "task_vectors.merging.ties:Ties",
            "arXiv 2306.01708",
            "Trim, elect a sign, average what agrees (recommended).",
        ),
        "average": Entry("task_vectors.merging.average:Average", "arXiv 2203.05482", "The mean of the vectors."),
        "task-arithmetic": Entry("task_vectors.merging.task_arithmetic:TaskArithmetic", "arXiv 2212.04089", "Their sum, scaled."),
        "pcb": Entry("task_vectors.merging.pcb:PCB", "arXiv 2410.02396", "Parameters compete in their task and between tasks."),
    },
    "recover": {
        "paser": Entry(
            "recovery.selection.paser:Paser",
            "arXiv 2502.12594",
            "By what the compressed model lost, drawn in proportion (recommended).",
        ),
        "random": Entry("recovery.selection.random:Random", "", "Samples drawn by chance: the floor to compare with."),
        "full": Entry("recovery.selection.random:Full", "", "All samples."),
        "dsir": Entry("recovery.selection.dsir:DSIR", "arXiv 2302.03169", "Importance resampling of hashed n-grams."),
        "zip-fit": Entry("recovery.selection.zip_fit:ZipFit", "arXiv 2410.18194", "Alignment under gzip."),
        "kmeans": Entry("recovery.selection.kmeans:KMeans", "arXiv 2409.11378", "Diversity: alike from every cluster."),
    },
    "export": {
        "gguf": Entry("exporting.gguf.method:Gguf", "", "One file for llama.cpp, Ollama and LM Studio."),
    },
}


def entry(stage: str, name: str) -> Entry:
    """The entry of a method; RequestError with the nearest name if there is none."""
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
    target = f"{type(method).__module__.removeprefix(PACKAGE + '.')}:{type(method).__name__}"
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


def request_class(stage: str, method: str) -> type[Any] | None:
    """Import the class of a stage's request; None if sizes depend on the data."""
    target = stage_of(stage, method).request
    found: type[Any] | None = _load(target) if target else None
    return found


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)
