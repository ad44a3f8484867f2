"""Run a recipe: run the steps in order, skip finished ones, then check the gates."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from compresskit.checkpoint.lock import locked
from compresskit.checkpoint.whole_files import storing, write_whole
from compresskit.errors import RequestError
from compresskit.evaluation.gates import GateResult, check_gates, parse_gate
from compresskit.recipe.progress import Progress, Say, Wanted
from compresskit.recipe.reading import Recipe
from compresskit.recipe.state import LOCK, State, open_state
from compresskit.recipe.work import do

__all__ = ["REPORT", "Wanted", "run"]
REPORT = "report.json"
EVERYTHING = Wanted()


def run(recipe: Recipe, out: Path, wanted: Wanted = EVERYTHING, say: Say = lambda line: None) -> dict[str, Any]:
    """Run a recipe into a folder; steps with unchanged settings and inputs are skipped.

    Returns:
        The dictionary that `--json` prints, including failed gates.

    Raises:
        RequestError: another run uses the folder, or the folder or a step is unusable.
        Interrupted: a signal stopped the run; the same call resumes it.
        CompresskitError: a step's own errors, see errors.py for the kinds.
    """
    started = time.monotonic()
    for name in (wanted.first, wanted.only):
        if name is not None:
            recipe.step(name)
    if wanted.dry_run:
        progress = _progress(recipe, open_state(out, False), wanted, say)
        todo = {step.name: reason for step in recipe.steps if (reason := progress.reason(step))}
        _say_plan(recipe, todo, say)
        return {"stage": "run", "output": str(out), "dry_run": True, "todo": todo}
    open_state(out, False)
    with _place(wanted) as ray:
        with storing(out):
            out.mkdir(parents=True, exist_ok=True)
        with locked(out / LOCK, out):
            state = open_state(out, wanted.overwrite)
            state.save()
            ran = _run_steps(recipe, _progress(recipe, state, wanted, say), ray)
            if wanted.only is None:
                state.clear([step.name for step in recipe.steps])
    gates = _gates(recipe, state)
    result = {
        "stage": "run",
        "recipe": str(recipe.path),
        "output": str(out),
        "source": recipe.source,
        "ran": ran,
        "skipped": [step.name for step in recipe.steps if step.name not in ran],
        "steps": {step.name: state.steps[step.name]["result"] for step in recipe.steps if step.name in state.steps},
        "gates": gates,
        "passed": all(gate["passed"] for gate in gates),
        "seconds": round(time.monotonic() - started, 3),
    }
    write_whole(out / REPORT, json.dumps(result, indent=1) + "\n")
    return result


def _progress(recipe: Recipe, state: State, wanted: Wanted, say: Say) -> Progress:
    keys: dict[str, str] = {}
    for step in recipe.steps:
        keys[step.name] = state.key(step, keys)
    return Progress(recipe, state, wanted, say, keys)


def _run_steps(recipe: Recipe, progress: Progress, ray: Any) -> list[str]:
    state, wanted = progress.state, progress.wanted
    if wanted.only is not None:
        for name in recipe.step(wanted.only).references:
            if not state.is_done(recipe.step(name), progress.keys[name]):
                raise RequestError(
                    f"--only {wanted.only}: reads step {name!r}, which is not done; run that first, or drop --only"
                )
    write_whole(state.out / "recipe.yaml", recipe.path.read_text(encoding="utf-8"))
    due = (step for step in recipe.steps if progress.is_due(step))
    if ray is not None:
        from compresskit.recipe.tasks import run_on

        run_on(ray, list(due), progress)
        return [step.name for step in recipe.steps if step.name in progress.ran]
    for step in due:
        work = progress.start(step)
        try:
            progress.finish(step, do(work, wanted.quiet))
        except KeyboardInterrupt as error:
            raise progress.interrupted([step.name]) from error
    return progress.ran


def _place(wanted: Wanted) -> AbstractContextManager[Any]:
    """The module ray, connected, where the steps run on a cluster; else None."""
    if wanted.on is None:
        return nullcontext()
    from compresskit.recipe.cluster import connected

    return connected(wanted.on)


def _say_plan(recipe: Recipe, todo: dict[str, str], say: Say) -> None:
    for step in recipe.steps:
        reason = todo.get(step.name)
        say(f"{step.name}: {'would run ' + step.title + ' (' + reason + ')' if reason else 'unchanged, would be skipped'}")


def _gates(recipe: Recipe, state: State) -> list[dict[str, Any]]:
    """All gates of the recipe and its evaluate steps, with GateResult's keys and `step`."""
    results: list[dict[str, Any]] = []
    for step in recipe.steps:
        report = (state.steps.get(step.name) or {}).get("result")
        texts = [*getattr(step.options, "gate", ()), *(recipe.gates if step.name in recipe.judged else ())]
        if not texts or report is None:
            continue
        found: list[GateResult] = check_gates([parse_gate(text) for text in texts], report)
        results += [{"step": step.name, **each.model_dump()} for each in found]
    return results
