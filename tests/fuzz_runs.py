"""The folder of a run for fuzz_readers.py: every file in it that `report`, `run`, `--resume` and `inspect` read and show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_mutations import Mutate, as_json
from fuzz_sources import adapter, llama, tensors, write_json
from safetensors.torch import save_file

from compresskit.checkpoint.manifest import finished_result
from compresskit.models import layouts
from compresskit.models.load import open_model
from compresskit.recipe import verdict
from compresskit.recipe.reading import load
from compresskit.recipe.state import open_state
from compresskit.recipe.work import recovered_result
from compresskit.report.collecting import read_result
from compresskit.report.inspect import inspect, listing
from compresskit.report.page import write_reports
from compresskit.report.reference_points import read_points

RECIPE = """\
source: {source}
steps:
  - prune: magnitude
  - {{name: repair, compensate: svd, original: source, rank: 2}}
  - {{name: merged, merge: average, source: [repair, repair]}}
  - {{evaluate: , source: prune, adapter: repair, against: source, data: "{{source}}/t.txt"}}
gates: [perplexity_ratio<=2]
"""
FACTS = {
    "widths": [[8], [4]], "bits": [3, 4], "importances": [0.5, 0.25], "losses": [2.0, 1.0, 0.5],
    "blocks": [{"rank": {"a": 2}, "error": 0.5, "error_before": 0.5, "error_after": {"a": 0.1, "b": 0.2}}, {"start_error": 0.5}],
    "clusters": [{"name": "a", "share": 0.5, "taken": 3}, {"name": "b", "share": 0.5, "taken": 4}],
}  # fmt: skip
SPEED = {
    "prompt_tokens": 8, "decoded_tokens": 8, "rounds": 1, "prefill_tokens_per_second": 9.0, "decode_tokens_per_second": 5.0,
    "peak_memory_bytes": 1000, "reference_prefill_tokens_per_second": 4.5, "reference_peak_memory_bytes": 2000,
}  # fmt: skip
EVALUATED = {
    "stage": "evaluate", "source": "prune", "adapter": "repair", "against": "m", "text": "a text", "tokens": 1000,
    "perplexity": 20.5, "reference_perplexity": 10.25, "perplexity_ratio": 2.0, "kl": 0.5, "top1_agreement": 0.75,
    "parameters": 1000, "bytes": 2000, "reference_parameters": 1200, "reference_bytes": 4000, "bits_per_weight": 4.5,
    "size_ratio": 0.5, "size_ratio_16bit": 0.5, "speed": SPEED, "tasks": {"t": 0.5, "u": {"accuracy": 0.5}},
    "gates": [], "warning": "a", "seconds": 1.0, "peak_memory_bytes": 1000,
    "generations": [{"prompt": "a?", "before": "b c", "after": "b d"}, {"prompt": "e?", "before": None, "after": ""}],
}  # fmt: skip
GATE = {
    "step": "evaluate", "metric": "perplexity_ratio", "operator": "<=", "limit": 1.5, "value": 2.0, "passed": False,
    "missed_by": 0.5, "needs": None,
}  # fmt: skip
STEPS = {
    "prune": {"stage": "prune", "method": "magnitude", "source": "m", "bytes_after": 10, "seconds": 1.0, "peak_memory_bytes": 9,
              "widths": [[8], [4]], "blocks": [{"rank": {"a": 2}}]},
    "repair": {"stage": "compensate", "method": "svd", "source": "prune", "bytes_after": 5, "seconds": None, "warning": "a",
               "kl_before": 0.5, "kl_after": 0.25, "kl_held_back": 0.5},
    "merged": {"stage": "merge", "method": "average", "source": ["repair", "repair"], "bytes_after": 5, "output": "m"},
    "evaluate": EVALUATED,
    "x": None,
}  # fmt: skip


def _manifest(stage: str, method: str, file: str, source: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "format_version": 1, "tool": "compresskit", "version": "0", "stage": stage, "method": method,
        "settings": {"method": method}, "inputs": {"folder": "m", "sha256": {"a": "00"}}, "outputs": {"sha256": {file: "00"}},
        "facts": FACTS, "source": source,
    }  # fmt: skip


def result_of(out: Path, steps: dict[str, Any]) -> dict[str, Any]:
    """What a run says of itself."""
    return {
        "stage": "run", "recipe": "r.yaml", "output": str(out), "source": "m", "ran": [], "skipped": [], "steps": steps,
        "gates": [], "passed": True, "seconds": 1.0,
    }  # fmt: skip


def run_folder(out: Path) -> None:
    """Write the folder of a run: a model with widths of its own per block, an adapter beside it, and what was measured."""
    model, repair = out / "prune", out / "repair"
    llama(model)
    config, files = layouts.configuration(open_model(model), [[12], [8]])
    narrow = {name: tensor for name, tensor in tensors(8).items() if ".1." in name}
    save_file(tensors() | narrow, model / "model.safetensors", metadata={"format": "pt"})
    write_json(model / "config.json", config)
    for name, text in files.items():
        (model / name).write_text(text)
    repair.mkdir()
    adapter(repair)
    pruned = _manifest("prune", "magnitude", "model.safetensors", None)
    write_json(model / "compresskit.json", pruned)
    write_json(repair / "compresskit.json", _manifest("compensate", "svd", "adapter_model.safetensors", pruned))
    (out / "evaluate").mkdir()
    write_json(out / "evaluate" / "report.json", EVALUATED)
    write_json(out / "report.json", result_of(out, STEPS) | {"gates": [GATE], "passed": False})
    steps = {name: {"key": "k", "status": "done" if step else "running", "result": step} for name, step in STEPS.items()}
    write_json(out / "run.json", {"format_version": 1, "steps": steps})


def _made(file: str) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        run_folder(folder)
        return file

    return make


def _final(file: str, step: str) -> Callable[[Path], str]:
    """A run whose last model is that of a step, with a file in it to damage."""

    def make(folder: Path) -> str:
        run_folder(folder)
        steps = {name: STEPS[name] for name in ("prune", "repair")[: 1 + (step == "repair")]}
        measured = EVALUATED | {"source": step, "adapter": None}
        write_json(folder / "report.json", result_of(folder, {**steps, "evaluate": measured}))
        if step == "repair":
            config = folder / "repair" / "adapter_config.json"
            config.write_text(config.read_text().replace('"base"', f'"{folder / "prune"}"'))
        return f"{step}/{file}"

    return make


def _points(folder: Path) -> str:
    """A run, and others' points for its chart."""
    run_folder(folder)
    points = [{"bytes": 1000, "perplexity_ratio": 1.5, "name": "3 bits"}, {"bytes": 900, "perplexity_ratio": 2.5}]
    write_json(folder / "points.json", {"a": points, "b": points[:1]})
    return "points.json"


def _compared(folder: Path) -> object:
    result = read_result(folder)
    return write_reports(folder, result, read_points(folder / "points.json", result)).read_text()


def _shown(folder: Path) -> object:
    return write_reports(folder, read_result(folder)).read_text()


def _resumed(folder: Path) -> object:
    """What `run` reads and shows of a state, without a step's work."""
    state = open_state(folder, overwrite=False)
    steps = {name: step["result"] for name, step in state.steps.items()}
    result = result_of(folder, steps)
    found = [
        verdict.markdown(result),
        verdict.junit(result),
        verdict.ending(result),
        [state.output(name).is_dir() for name in steps],
    ]
    write_reports(folder, result)
    (folder / "r.yaml").write_text(RECIPE.format(source="m"))
    return found


def _measured_before(folder: Path) -> object:
    """What `run` takes up of an evaluation that had finished when it was killed."""
    (folder / "r.yaml").write_text("source: m\nsteps:\n  - evaluate:\n")
    found = recovered_result(load(folder / "r.yaml").steps[0], folder / "evaluate")
    result = result_of(folder, {"evaluate": found})
    return write_reports(folder, result), verdict.markdown(result)


def _finished(folder: Path) -> object:
    return finished_result(folder / "prune")


def _inspected(step: str) -> Callable[[Path], object]:
    return lambda folder: listing(inspect(str(folder / step)))


Parts = tuple[Callable[[Path], str], Mutate, Callable[[Path], object], bool, float]
RUNS: dict[str, Parts] = {
    "report.json": (_made("report.json"), as_json, _shown, False, 3),
    "reference points": (_points, as_json, _compared, False, 1),
    "report of a step": (_made("evaluate/report.json"), as_json, _measured_before, False, 1),
    "state of a run": (_made("run.json"), as_json, _resumed, False, 2),
    "manifest of a step": (_made("repair/compresskit.json"), as_json, _shown, False, 2),
    "manifest of a finished step": (_made("prune/compresskit.json"), as_json, _finished, False, 0.5),
    "configuration that is served": (_final("config.json", "prune"), as_json, _shown, False, 1),
    "generation that is served": (_final("tokenizer_config.json", "prune"), as_json, _shown, False, 0.5),
    "adapter that is served": (_final("adapter_config.json", "repair"), as_json, _shown, False, 1),
    "configuration that is inspected": (_made("prune/config.json"), as_json, _inspected("prune"), False, 1),
    "manifest that is inspected": (_made("prune/compresskit.json"), as_json, _inspected("prune"), False, 0.5),
    "adapter that is inspected": (_made("repair/adapter_config.json"), as_json, _inspected("repair"), False, 0.5),
}
