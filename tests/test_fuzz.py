"""errors.py, checkpoint/small_files.py: whatever a file holds, its reader refuses it by name or reads it. Property, corpus.

A sample of what benchmarks/fuzz.py runs at length, and the faults that were found so far.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
from fuzz_mutations import RAWS
from fuzz_readers import READERS, Bench
from fuzz_runs import EVALUATED, GATE, STEPS, result_of
from fuzz_sources import CONFIG

from compresskit.checkpoint.reader import tensors_in
from compresskit.errors import CompresskitError
from compresskit.evaluation.task_files import read_tasks
from compresskit.recipe.reading import load
from compresskit.recovery.data.instructions import read_instructions

MUTATIONS = 50


def report(step: object = None, name: str = "evaluate", **changed: object) -> bytes:
    """The report of a run with one step changed, or a key of its own."""
    return json.dumps(result_of(Path("out"), STEPS | {name: step}) | changed).encode()


def manifest(**changed: object) -> bytes:
    """The manifest of a finished step, with keys changed."""
    made = {"tool": "compresskit", "stage": "compensate", "method": "svd", "settings": {}, "facts": {}, "source": None}
    return json.dumps(made | changed).encode()


CORPUS: dict[str, tuple[str, bytes]] = {
    "a list for a file in the index": ("index", b'{"weight_map": {"a": ["model.safetensors"]}}'),
    "null for a file in the index": ("index", b'{"weight_map": {"a": "model-00000.safetensors", "b": null}}'),
    "a file outside the folder in the index": ("index", b'{"weight_map": {"a": "../model.safetensors"}}'),
    "deep JSON": ("config.json", b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "5,000 digits": ("config.json", b'{"model_type": "llama", "hidden_size": ' + b"9" * 5000 + b"}"),
    **{f"{value} blocks": ("config.json", json.dumps(CONFIG | {"num_hidden_layers": value}).encode())
       for value in (10**12, True, "4", -1, 0, 1, 3, None, 2.0)},
    "a quantization that is a list": ("config.json", json.dumps(CONFIG | {"quantization_config": [1]}).encode()),
    "a model type that is a list": ("config.json", b'{"model_type": ["llama"]}'),
    "a chain of manifests through a list": ("manifest", b'{"source": ["a"]}'),
    "a manifest that names another folder's file": ("manifest", b'{"outputs": {"sha256": {"../../etc/passwd": "00"}}}'),
    "a manifest with masks that are none": (
        "manifest of a pruning", b'{"stage": "prune", "facts": {"blocks": [{"kept_channels": 3}]}}',
    ),
    "a manifest without facts": ("manifest of a pruning", b'{"stage": "prune"}'),
    "more channels kept than there were": (
        "manifest of a pruning", b'{"stage": "prune", "facts": {"blocks": [{"kept_channels": [["0000ff"]]}]}}',
    ),
    "an alpha that is a text": ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": "4"}'),
    "a pattern that is none": ("adapter_config.json", b'{"peft_type": "LORA", "lora_alpha": 4, "alpha_pattern": {"(": 3}}'),
    "a home folder in a source": ("recipe", b"source: ${HOME}/m\nsteps:\n  - prune: cfsp\n"),
    "a source that is itself": ("recipe", b"source: ${source}\nsteps:\n  - prune: cfsp\n"),
    "a key that is a list": ("recipe", b"source: m\n? [a, b]\n: 1\n"),
    "a key of 5,000 digits": ("recipe", b"source: m\n" + b"1" * 5000 + b": 1\n"),
    "a date": ("recipe", b"source: m\nsteps:\n  - prune: cfsp\n    seed: 2001-99-99\n"),
    "infinity in a recipe": ("recipe", b"source: m\nsteps:\n  - prune: cfsp\n    sparsity: .inf\n"),
    "bytes": ("recipe", b"source: !!binary aGVsbG8=\n"),
    "lists in lists": ("recipe", b"a: " + b"[" * 50_000),
    "aliases in aliases": ("recipe", b"a0: &a0 [x]\n" + b"".join(b"a%d: &a%d [*a%d]\n" % (i, i, i - 1) for i in range(1, 900))),
    "merges of merges": (
        "recipe", b"a0: &a0 {x: 1}\n" + b"".join(
            b"a%d: &a%d {<<: [%s]}\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 9)) for i in range(1, 30)),
    ),
    "a disk as a matrix": ("recipe", b"source: m\nmatrix: {x: '/**'}\nsteps:\n  - prune: cfsp\n    source: ${x}\n"),
    "a pattern of two lines": ("recipe", b'source: m\nmatrix: {x: "a\\nb"}\nsteps:\n  - prune: cfsp\n'),
    "a folder's name of 3,000 characters": ("recipe", b"source: m\nmatrix: {x: %s/a}\nsteps:\n  - prune: cfsp\n" % (b"x" * 3000)),
    "a large matrix of few steps": (
        "recipe", b"source: m\nmatrix: {%s}\nsteps:\n%s" % (
            b", ".join(b"v%d: [1, 2, 3, 4, 5]" % i for i in range(9)),
            b"".join(b"  - evaluate:\n    limit: ${v%d}\n" % i for i in range(9))),
    ),
    "a text that grows": (
        "recipe",
        b"source: m\nvariables: {v: %s}\nsteps:\n  - prune: cfsp\n    calibration: a%s\n" % (b"x" * 9000, b"${v}" * 9000),
    ),
    "a parquet file that is none": ("calibration.parquet", b"PAR1" + b"\x00" * 50 + b"PAR1"),
    "instructions in no parquet file": ("instructions.parquet", b"nothing"),
    "deep JSON in a row": ("instructions.jsonl", b"[" * 100_000),
    "messages that are numbers": ("instructions.json", b'[{"messages": [1, 2]}]'),
    "half of a pair in a text": ("calibration.jsonl", b'{"text": "\\ud800"}'),
    "a column of two lines": ("calibration.jsonl", b'{"tex\\nt": "a"}'),
    "digits in a calibration text": ("calibration.jsonl", b'{"text": "a", "n": ' + b"1" * 5000 + b"}"),
    "half of a pair in a task": ("task file", b'{"question": "\\ud800", "choices": ["a", "b"], "answer": 0}\n' * 2),
    "broken UTF-8 in a task": ("task file", b'{"text": "a b\xff"}\n'),
    "a tokenizer with a broken normalizer": (
        "tokenizer.json", b'{"version": "1.0", "added_tokens": [], "normalizer": {"type": "Precompiled", '
        b'"precompiled_charsmap": "AAAA"}, "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ),
    "a tokenizer's configuration that is a list": ("tokenizer_config.json", b"[]"),
    "a selection without choices": ("selection.json", b'{"facts": {}, "labels": []}'),
    "a report with a step elsewhere": ("report.json", report({"stage": "prune", "source": "m"}, "../x")),
    "a report without a list of steps": ("report.json", report(steps=None)),
    "a report with a step that is a number": ("report.json", report(3)),
    "a report that measures several models": ("report.json", report(EVALUATED | {"source": []})),
    "a report with seconds that are a list": ("report.json", report({"stage": "prune", "seconds": [1]}, "prune")),
    "a report with a task without a score": ("report.json", report(EVALUATED | {"tasks": {"t": None}})),
    "a report without what was measured": ("report.json", report({"stage": "evaluate"})),
    "a report with a gate that is a text": ("report.json", report(EVALUATED, gates=["kl<=1"])),
    "a report with a gate without a limit": ("report.json", report(EVALUATED, gates=[GATE | {"limit": None}])),
    "a report of no recipe": ("report.json", report(EVALUATED, recipe=None)),
    "a step's report with a text for its bytes": ("report of a step", json.dumps(EVALUATED | {"bytes": "4"}).encode()),
    "a state with an output that is a list": (
        "state of a run", json.dumps({"format_version": 1, "steps": {"prune": {
            "key": "k", "status": "done", "result": {"stage": "prune", "output": ["m"]}}}}).encode(),
    ),
    "a state with a name that no folder can have": (
        "state of a run", json.dumps({"format_version": 1, "steps": {"x" * 300: {
            "key": "k", "status": "done", "result": None}}}).encode(),
    ),
    "a manifest of no stage": ("manifest of a step", manifest(stage=None)),
    "a manifest with facts that are a list": ("manifest of a step", manifest(facts=[1])),
    "a manifest after one of no method": ("manifest of a step", manifest(source={"stage": "prune"})),
    "a finished step's manifest without settings": ("manifest of a finished step", manifest(settings=None)),
    "bits that are a text": ("gptq config", b'{"quantization_config": {"quant_method": "gptq", "bits": "4"}}'),
    "groups that are a list": (
        "compressed-tensors config", b'{"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}',
    ),
}  # fmt: skip
"""The faults that were found: a reader, and the file that it did not bear."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_by_name_or_read(name: str, tmp_path: Path) -> None:
    bench = Bench(name, tmp_path / "files")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries warn of what is then refused, or is harmless
        found = {seed: bench.judged(bench.mutation(seed)) for seed in range(round(MUTATIONS * min(1, bench.reader.share)))}
    assert {seed: verdict for seed, verdict in found.items() if verdict.outcome not in ("refused", "accepted")} == {}
    assert bench.judged(bench.original).outcome == "accepted"


@pytest.mark.parametrize("fault", CORPUS)
def test_a_fault_that_was_found_stays_mended(fault: str, tmp_path: Path) -> None:
    name, data = CORPUS[fault]
    bench = Bench(name, tmp_path / "files")
    verdict = bench.judged(data)
    assert verdict.outcome == "refused"
    assert verdict.seconds < 2


@pytest.mark.parametrize("raw", RAWS)
@pytest.mark.parametrize(
    "name",
    ["config.json", "manifest", "report.json", "state of a run", "report of a step", "selection.json", "instructions.json"],
)
def test_any_json_for_a_whole_file_is_refused_or_read(name: str, raw: str, tmp_path: Path) -> None:
    bench = Bench(name, tmp_path / "files")
    assert bench.judged(raw.encode()).outcome in ("refused", "accepted")


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    for name in ("model.safetensors", "d.jsonl", "t.jsonl", "r.yaml"):
        os.mkfifo(tmp_path / name)
    calls = (
        lambda: tensors_in(tmp_path / "model.safetensors"),
        lambda: read_instructions([tmp_path / "d.jsonl"]),
        lambda: read_tasks(tmp_path, ["t"], None, 0, 0),
        lambda: load(tmp_path / "r.yaml"),
    )
    for call in calls:
        with pytest.raises(CompresskitError, match=str(tmp_path)):
            call()
