"""Run a recipe: run the steps in order, skip finished ones, then check the gates."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint.kinds import Stated
from compresskit.checkpoint.lock import locked
from compresskit.checkpoint.manifest import finished_result
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import storing, write_whole
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import Interrupted, RequestError
from compresskit.evaluation.gates import GateResult, check_gates, parse_gate
from compresskit.machine.memory import release_freed_memory, restart_peak
from compresskit.methods import runner, stage_of
from compresskit.recipe.reading import Recipe
from compresskit.recipe.results import check_step
from compresskit.recipe.state import LOCK, OUTDATED, RUNNING, State, open_state
from compresskit.recipe.steps import REFERENCE, Step, resolved

REPORT = "report.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """The part of a recipe to run, and how."""

    first: str | None = None
    """Redo this step and all steps after it."""
    only: str | None = None
    """Redo only this step, on the existing results of the others."""
    dry_run: bool = False
    """Show what would be done without doing it."""
    overwrite: bool = False
    """Start over."""
    quiet: bool = True


def run(recipe: Recipe, out: Path, wanted: Wanted = Wanted(), say: Say = lambda line: None) -> dict[str, Any]:
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
        state = open_state(out, False)
        keys = _keys(recipe, state)
        todo = {step.name: reason for step in recipe.steps if (reason := _reason(recipe, step, keys, state, wanted))}
        _say_plan(recipe, todo, say)
        return {"stage": "run", "output": str(out), "dry_run": True, "todo": todo}
    open_state(out, False)
    with storing(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK, out):
        state = open_state(out, wanted.overwrite)
        state.save()
        ran = _run_steps(recipe, state, wanted, say)
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


def _keys(recipe: Recipe, state: State) -> dict[str, str]:
    keys: dict[str, str] = {}
    for step in recipe.steps:
        keys[step.name] = state.key(step, keys)
    return keys


def _reason(recipe: Recipe, step: Step, keys: dict[str, str], state: State, wanted: Wanted) -> str | None:
    """Reason why the step must run; None if it can be skipped."""
    names = [each.name for each in recipe.steps]
    asked = wanted.only == step.name or (wanted.first is not None and names.index(step.name) >= names.index(wanted.first))
    if wanted.only is not None or asked:
        return "asked for" if asked else None
    found = state.steps.get(step.name)
    if found is None:
        return "not run yet"
    if found["status"] == OUTDATED:
        return "asked for"
    if found["key"] != keys[step.name]:
        return "its settings or inputs have changed"
    if state.is_done(step, keys[step.name]):
        return None
    return "was interrupted" if found["status"] == RUNNING else "its output is gone or was changed"


def _run_steps(recipe: Recipe, state: State, wanted: Wanted, say: Say) -> list[str]:
    keys = _keys(recipe, state)
    ran: list[str] = []
    if wanted.only is not None:
        for name in recipe.step(wanted.only).references:
            if not state.is_done(recipe.step(name), keys[name]):
                raise RequestError(
                    f"--only {wanted.only}: reads step {name!r}, which is not done; run that first, or drop --only"
                )
    write_whole(state.out / "recipe.yaml", recipe.path.read_text(encoding="utf-8"))
    for number, step in enumerate(recipe.steps, start=1):
        position = f"[{number}/{len(recipe.steps)}] {step.name}"
        reason = _reason(recipe, step, keys, state, wanted)
        if reason is None:
            if wanted.only is None and state.steps[step.name]["status"] == RUNNING:
                say(f"{position}: had finished when the run was stopped")
                state.finish(step, recovered_result(step, state.folder(step.name)))
            elif wanted.only is None:
                say(f"{position}: unchanged, skipped")
            continue
        say(f"{position}: {step.title} ({reason})")
        goes_on = state.begin(step, keys[step.name])
        try:
            state.finish(step, _run_step(step, state, goes_on, wanted.quiet))
        except KeyboardInterrupt as error:
            how = "the same command without --overwrite" if wanted.overwrite else "the same command"
            raise Interrupted(f"interrupted in step {step.name!r}; {how} goes on from there") from error
        ran.append(step.name)
        if warning := state.steps[step.name]["result"].get("warning"):
            say(f"compresskit: warning: {step.name}: {warning}")
    return ran


def _run_step(step: Step, state: State, goes_on: bool, quiet: bool) -> dict[str, Any]:
    def folders(text: str) -> str:
        return REFERENCE.sub(lambda found: str(state.output(found[1])), text)

    options = resolved(step.options, folders)
    method = resolved(step.method, folders) if step.method else None
    sources: str | list[str] = [folders(each) for each in step.sources]
    if len(sources) == 1 and not getattr(stage_of(step.stage, step.method_name or ""), "several", False):
        sources = sources[0]
    work = runner(step.stage, step.method_name or "")
    gc.collect()  # fine-tuning leaves reference cycles that keep the source's weights mapped until they are collected
    release_freed_memory()
    restart_peak()
    if not step.writes_model:
        folder = state.folder(step.name)
        if not step.file:
            report = work(sources, options, quiet=quiet)
        with storing(folder):
            folder.mkdir(exist_ok=True)
        if step.file:
            options = options.model_copy(update={"overwrite": True})
            report = work(method, sources, folder / step.file, options, quiet=quiet)
        write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")
        return report
    decided = {"resume": goes_on, "overwrite": state.folder(step.name).is_dir()}
    options = options.model_copy(update={key: value for key, value in decided.items() if key in type(options).model_fields})
    given = (*((method,) if method is not None else ()), sources, state.folder(step.name), options)
    result: dict[str, Any] = work(*given, quiet=quiet)
    return result


def recovered_result(step: Step, folder: Path) -> dict[str, Any]:
    """Reconstruct the result of a step that finished just before its run was killed, from its folder; its time is unknown."""
    file = folder / (MANIFEST if step.writes_model else REPORT)
    result = finished_result(folder) if step.writes_model else read_json(file)
    check_step(result, step.name, Stated(file, remedy=f"remove {folder}, and run again"))
    return result


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
