"""Every reader of files that others made: a valid file, ways to damage it, the call, and the judge of what came of it.

A damaged file must be refused with one line that names it, or be read; in little time and memory either way. Where the file
carries a checksum, what is read must be what was written.
"""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from archive_files import read as read_archive
from fuzz_formats import FORMATS
from fuzz_mutations import Mutate, as_json, as_lines, as_safetensors, as_yaml, bytewise
from fuzz_runs import RUNS
from fuzz_sources import MESSAGES, ROWS, TASKS, adapter, archive, llama, parquet_file, pruned_pair, ternary, write_json
from ternary_files import read as read_ternary

from compresskit.calibration.files import read_file
from compresskit.calibration.sampling import _cached, _checksum, start_token
from compresskit.calibration.tokens import encode
from compresskit.checkpoint.manifest import chain, changed_files, check_unchanged
from compresskit.checkpoint.reader import Checkpoint, open_checkpoint, tensors_in
from compresskit.errors import CompresskitError
from compresskit.evaluation.task_files import read_tasks
from compresskit.formats.peft import open_adapter
from compresskit.models.load import attached, open_model
from compresskit.models.pair import different_tokenizers, pair
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recipe.reading import load
from compresskit.recovery.data.instructions import read_instructions
from compresskit.recovery.selection.files import read_selection
from compresskit.task_vectors.vector import open_task_vector

MOST_SECONDS = 5.0
MOST_KIBIBYTES = 1 << 20


@dataclass(frozen=True)
class Reader:
    """A reader and the file that it is given damaged."""

    make: Callable[[Path], str]
    """Write valid files into a folder; returns the name of the one to damage."""
    damage: Mutate
    read: Callable[[Path], object]
    """Read what is in the folder, the whole of it."""
    checksum: bool = False
    """Whether another content than the original's must be refused."""
    share: float = 1.0
    """How often it is tried, compared to the others; slow ones less."""


class Verdict(NamedTuple):
    """What came of one damaged file."""

    outcome: str
    """refused, accepted, or what is wrong."""
    seconds: float


def _whole(folder: Path) -> object:
    """All tensors of a checkpoint file, by header and by content."""
    specs = {spec.name: spec for spec in tensors_in(folder / "model.safetensors")}
    store = Checkpoint(folder, {}, specs, dict.fromkeys(specs, folder / "model.safetensors"))
    return {name: store.read(name) for name in specs}


def _adapter(folder: Path) -> object:
    found = open_adapter(folder)
    open_task_vector(folder, None)
    return [(name, found.scaling(name), found.update(name)) for name in found.names]


def _attached(folder: Path) -> object:
    return attached(open_model(folder / "base"), open_adapter(folder)).adapter


def _manifest(folder: Path) -> object:
    store = open_checkpoint(folder)
    return [len(chain(store.manifest)), changed_files(folder, store.manifest or {})]


def _unchanged(folder: Path) -> object:
    check_unchanged(open_checkpoint(folder))
    return (folder / "model.safetensors").read_bytes()


def _cache(folder: Path) -> str:
    import torch
    from safetensors.torch import save_file

    tokens = torch.arange(32).reshape(4, 8)
    save_file({"tokens": tokens, "sha256": _checksum(tokens, "key")}, folder / "file")
    return "file"


def _from_cache(folder: Path) -> object:
    found = _cached(folder / "file", "key", (4, 8), 32)
    return None if found is None else found.tolist()


def _tokens(folder: Path) -> object:
    return encode(folder, "some words and 12 numbers", special_tokens=False)


def _opened_tokenizer(folder: Path) -> object:
    open_tokenizer(folder)
    return encode(folder, "some words", special_tokens=True)


def _text(name: str, text: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        (folder / name).write_text(text)
        return name

    return make


def _lines(name: str, rows: list[dict[str, object]]) -> Callable[[Path], str]:
    return _text(name, "".join(json.dumps(row) + "\n" for row in rows))


def _json(name: str, value: object) -> Callable[[Path], str]:
    return lambda folder: write_json(folder / name, value)


def _beside_model(name: str, value: object, width: int = 12) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        llama(folder, width=width)
        return write_json(folder / name, value) if value is not None else name

    return make


RECIPE = """\
description: two steps and a measurement
source: demo:smollm2-135m
variables: {text: self}
defaults: {samples: 8, calibration: "${text}"}
matrix:
  bits: [3, 4]
steps:
  - prune: cfsp
    sparsity: 0.2
  - quantize: gptq
    bits: ${bits}
  - name: final
    evaluate:
    against: ${source}
gates: ["perplexity_ratio<=1.2"]
"""
SELECTION = {"choices": [[0, "near", 1, 0.5, None, -1.0, None], [1, "far"]], "facts": {"a": 1}, "labels": [0, 1]}
MANIFEST = {"format_version": 1, "stage": "prune", "inputs": {"folder": "m", "sha256": {"a": "00"}}, "facts": {},
            "outputs": {"sha256": {"model.safetensors": "00"}}, "source": {"stage": "quantize", "source": None}}  # fmt: skip

READERS: dict[str, Reader] = {
    "safetensors": Reader(lambda f: llama(f) and "model.safetensors", as_safetensors, _whole, share=2),
    "model weights": Reader(lambda f: llama(f) and "model.safetensors", as_safetensors, open_model, share=2),
    "index": Reader(lambda f: llama(f, shards=2), as_json, open_checkpoint),
    "config.json": Reader(lambda f: llama(f) and "config.json", as_json, open_model, share=4),
    "generation_config.json": Reader(
        _beside_model("generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.5}),
        as_json, lambda f: start_token(open_model(f)),
    ),
    "adapter_config.json": Reader(lambda f: adapter(f) and "adapter_config.json", as_json, _adapter, share=2),
    "adapter weights": Reader(lambda f: adapter(f) and "adapter_model.safetensors", as_safetensors, _adapter),
    "adapter of a model": Reader(lambda f: adapter(f, base=True), as_safetensors, _attached, share=0.5),
    "manifest": Reader(_beside_model("compresskit.json", MANIFEST), as_json, _manifest),
    "weights in a manifest": Reader(lambda f: llama(f, manifest=True), as_safetensors, _unchanged, checksum=True),
    "manifest of a pruning": Reader(
        pruned_pair, as_json, lambda f: pair(open_model(f), open_model(f / "original")).kept, share=0.5,
    ),
    "recipe": Reader(_text("r.yaml", RECIPE), as_yaml, lambda f: load(f / "r.yaml"), share=1),
    "recipe in JSON": Reader(
        _json("r.yaml", {"source": "m", "matrix": {"b": [3, 4]}, "steps": [{"quantize": "rtn", "bits": "${b}"}]}),
        as_yaml, lambda f: load(f / "r.yaml"), share=1,
    ),
    "instructions.jsonl": Reader(_lines("d.jsonl", ROWS), as_lines, lambda f: read_instructions([f / "d.jsonl"]), share=4),
    "instructions.json": Reader(_json("d.json", MESSAGES), as_json, lambda f: read_instructions([f / "d.json"]), share=3),
    "instructions.parquet": Reader(
        lambda f: parquet_file(f, "d.parquet"), bytewise, lambda f: read_instructions([f / "d.parquet"]),
    ),
    "calibration.txt": Reader(_text("t.txt", "words é\n" * 9), bytewise, lambda f: read_file(f / "t.txt", "", 0), share=4),
    "calibration.jsonl": Reader(
        _lines("t.jsonl", [{"text": "a b"}, {"text": None}, {"text": "é", "n": 1}]),
        as_lines, lambda f: read_file(f / "t.jsonl", "", 0), share=4,
    ),
    "calibration.parquet": Reader(
        lambda f: parquet_file(f, "t.parquet"), bytewise, lambda f: read_file(f / "t.parquet", "output", 0),
    ),
    "task file": Reader(
        _lines("task.jsonl", TASKS), as_lines, lambda f: read_tasks(f, ["task"], None, 1, 0), share=4,
    ),
    "packed folder": Reader(archive, bytewise, lambda f: read_archive(f / "file", f / "out"), checksum=True),
    "ternary container": Reader(ternary, as_safetensors, lambda f: read_ternary(f / "file"), checksum=True, share=2),
    "tokenizer.json": Reader(_beside_model("tokenizer.json", None), as_json, _tokens),
    "tokenizers of a pair": Reader(
        lambda f: pruned_pair(f) and "tokenizer.json", as_json, lambda f: different_tokenizers(f, f / "original"), share=0.5,
    ),
    "tokenizer_config.json": Reader(_beside_model("tokenizer_config.json", None), as_json, _opened_tokenizer, share=0.1),
    "selection.json": Reader(_json("selection.json", SELECTION), as_json, read_selection, share=4),
    "calibration cache": Reader(_cache, as_safetensors, _from_cache, checksum=True, share=2),
} | {name: Reader(*parts) for name, parts in (FORMATS | RUNS).items()}  # fmt: skip


class Bench:
    """A reader with its valid files in a folder, ready to be given damaged ones."""

    def __init__(self, name: str, folder: Path):
        self.reader = READERS[name]
        self.folder = folder
        folder.mkdir(parents=True)
        self.file = folder / self.reader.make(folder)
        self.original = self.file.read_bytes()
        self.expected = self.reader.read(folder)

    def mutation(self, seed: int) -> bytes:
        """The damaged file of this seed."""
        return self.reader.damage(self.original, random.Random(seed))

    def judged(self, data: bytes) -> Verdict:
        """Read a damaged file, and judge what came of it."""
        self.file.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        try:
            found = self.reader.read(self.folder)
            other = self.reader.checksum and found is not None and found != self.expected
            outcome = "accepted as something else" if other else ("accepted" if found is not None else "refused")
        except CompresskitError as error:
            outcome = self._of_refusal(str(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome = f"{type(error).__name__}: {error}"[:300]
        seconds = time.perf_counter() - started
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if seconds > MOST_SECONDS or more > MOST_KIBIBYTES:
            outcome = f"{seconds:.1f} seconds, {more >> 10} MiB ({outcome})"
        return Verdict(outcome, seconds)

    def _of_refusal(self, said: str) -> str:
        named = str(self.folder) in said or self.file.name in said or "--" in said
        return "refused" if named and len(said.splitlines()) == 1 and said.isprintable() else f"unclear: {said!r}"[:400]
