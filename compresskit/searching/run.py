"""Run the search stage: score, search, write the front and the recipe, and store the model of the chosen point.

The codes of the options, the scores and the trials stay in `OUT.partial/training/` until OUT is complete; `--resume`
continues from there.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.folder import open_training
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import write_whole_json
from compresskit.errors import RequestError
from compresskit.job import HELD_BACK, Job, run_request
from compresskit.machine.precision import torch_dtype
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.run import quantize_into
from compresskit.searching.options import SearchOptions
from compresskit.searching.request import TOGETHER, SearchRequest, open_request
from compresskit.searching.results import JSON, RECIPE, baseline, described, explained, recipe

if TYPE_CHECKING:
    from compresskit.searching.records import Records
    from compresskit.searching.strategy import Found, Problem

COSTS = "costs.json"
TOLERANCE = 1.1
"""Times a largest loss on held-back text: short texts differ by so much."""
SHOWN = (
    "chosen", "rank_correlation", "rank_correlation_at_equal_bytes", "rank_correlation_corrected", "measured_front", "random",
    "passes",
)  # fmt: skip
"""Keys of search.json that the manifest and `--json` have too."""


@dataclass(frozen=True)
class ChosenRequest(QuantizeRequest):
    """The request that stores the chosen point; the files of the search lie beside the weights."""

    search_files: tuple[tuple[str, str], ...] = ()

    def outputs(self) -> Outputs:
        """The checkpoint's files, search.json and recipe.yaml."""
        found = super().outputs()
        return replace(found, files={**found.files, **dict(self.search_files)})


def search(source_name: str, out: Path, options: SearchOptions, quiet: bool = True) -> dict[str, Any]:
    """Choose bits and group size of every unit of a model, and store it so.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, KL in nats a token.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    return run_request(lambda: open_request(source_name, out, options), _search, quiet)


def _search(request: SearchRequest, job: Job) -> dict[str, Any]:
    from compresskit.searching.strategy import within_budget, within_loss

    folder = open_training(job.work, job.key, request.options.resume)
    problem, records = _problem(request, job, folder)
    most = request.options.max_loss
    if most is None:
        assert request.budget is not None, "the request checks that there is a target"
        found: Found | None = within_budget(problem, records, request.budget)
    else:
        found = within_loss(problem, records, most)
    if found is None:
        raise RequestError(f"--max-loss {most:g}: no choice of --levels {request.options.levels} comes so close; allow more bits")
    made = described(request, found, problem.costs, _losses(request, problem, records, found))
    made["passes"] = {
        "trials": len(records.asked),
        "windows": records.windows,
        "passes": records.windows / request.options.samples,
    }
    facts = {key: made[key] for key in SHOWN}
    files = ((JSON, json.dumps(made, indent=1) + "\n"), (RECIPE, recipe(request, found.chosen)))
    result = _stored(request, job, found, files, facts)
    if missed := _missed(most, result.get("kl_held_back")):
        result["warning"] = result.get("warning") or missed
    notes = [baseline(made["random"], made["chosen"]["kl_quick"])]
    return result | facts | {"notes": notes + ([explained(row) for row in made["reasons"]] if request.options.explain else [])}


def _missed(most: float | None, held_back: float | None) -> str:
    """What to say where a largest loss is not kept on text that no trial saw; "" where it is."""
    if most is None or held_back is None or held_back <= TOLERANCE * most:
        return ""
    return f"--max-loss {most:g}: on held-back text the KL is {held_back:.4g}; ask for less, or give more --verify-windows"


def _losses(request: SearchRequest, problem: Problem, records: Records, found: Found) -> dict[str, Any]:
    """Measured KL of the chosen assignment, and of the predicted best."""
    chosen, start = records.kl([found.chosen, found.start], problem.windows)
    return {
        "kl": chosen,
        "kl_quick": records.kl([found.chosen], problem.quick_windows)[0],
        "kl_of_predicted_best": start,
        "verify_windows": problem.windows,
    }


def _problem(request: SearchRequest, job: Job, folder: Path) -> tuple[Problem, Records]:
    """The scores, and what measures trials."""
    from compresskit.searching.records import Records
    from compresskit.searching.scoring import score
    from compresskit.searching.strategy import Problem
    from compresskit.searching.trials import divergences
    from compresskit.walk.walk import Walk

    options, units = request.options, request.units
    if not (folder / COSTS).is_file():
        text = job.tokens[: min(options.score_windows, options.samples)]
        scale_dtype = torch_dtype(request.quantize_request(request.smallest).scale_dtype)
        with job.work.scratch() as scratch:
            walk = Walk(request.model, text, job.where, 1, job.images)
            costs = score(walk, units, request.trial_rounding, scale_dtype, (scratch, folder), job.bars)
        write_whole_json(folder / COSTS, {"costs": costs})
    costs = read_json(folder / COSTS)["costs"]
    verify = job.tokens[options.samples : -HELD_BACK]
    read_in = torch_dtype(request.quantize_request(request.planned).unpacked_dtype)

    def measure(assignments: Any, first: int, last: int) -> list[list[float]]:
        walk = Walk(request.model, verify[first:last], job.where, images=job.images)
        return divergences(walk, units, folder, assignments, read_in, job.bars)

    problem = Problem(
        costs, request.sizes, request.kinds, options.quick_windows, options.verify_windows, request.trial_windows, options.seed
    )
    return problem, Records.read(folder, measure, TOGETHER)


def _stored(
    request: SearchRequest, job: Job, found: Found, files: tuple[tuple[str, str], ...], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the model, or with `--no-run` the search's files alone."""
    import torch

    if not request.options.run:
        writer = job.writer(Outputs(files=dict(files)), facts)
        job.commit(writer, {})
        before = request.model.parameters, request.model.bytes
        return job.result(before, before)
    chosen = ChosenRequest(request.rounding(found.chosen), request.model, request.out, request.options, search_files=files)
    chosen.check()
    tokens = torch.cat([job.tokens[: request.options.samples], job.tokens[-HELD_BACK:]])
    return quantize_into(chosen, replace(job, tokens=tokens), **facts)
