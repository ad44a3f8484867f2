"""Run the steps of a recipe as Ray tasks: a task a step, as many side by side as the cluster has room for.

The process that runs the recipe alone writes its state and record. A task gets a `Work` and writes its step's folder. Ray
starts a task again whose worker or node died, and the task goes on with what the dead one left.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import CompresskitError, StorageWarning
from compresskit.machine.libraries import let_threads_sleep
from compresskit.recipe.cluster import Place, checked, first_line, nodes_of
from compresskit.recipe.nodes import THREADS, Needs, Node, check_node, look, needs
from compresskit.recipe.progress import Progress
from compresskit.recipe.steps import Step
from compresskit.recipe.work import Work, do_again

RETRIES = 3
"""How often Ray starts a step again whose worker or node died."""
LOOK_SECONDS = 1.0
"""Time between two looks at which nodes are alive."""
CANCEL_SECONDS = 5.0
"""Time for a step to end by itself after an interrupt; then its process is killed."""


@dataclass(frozen=True)
class Due:
    """A step that has to run, and what it needs of a node."""

    step: Step
    needs: Needs


def run_on(ray: Any, steps: Sequence[Step], progress: Progress) -> None:
    """Run steps on the connected cluster, after a check of every node, and record them in the recipe's order.

    Raises:
        RequestError: a step or a node cannot work as the cluster is; refused before any work.
        Interrupted: a signal stopped the run.
        CompresskitError: see `run_steps`.
    """
    if not steps:
        return
    from compresskit.recipe.plan import planned_steps

    found, state, recipe = nodes_of(ray), progress.state, progress.recipe
    memory = {row["step"]: row["peak_memory_bytes"] for row in planned_steps(recipe, probe=False)}
    due = [Due(step, needs(step, memory[step.name], found)) for step in steps]
    with checked(ray, found, state.out, steps) as place:
        run_steps(ray, found, due, place, progress)
    names = [step.name for step in recipe.steps]
    state.steps = {name: state.steps[name] for name in sorted(state.steps, key=lambda each: (*names, each).index(each))}
    state.save()


def _task(work: Work, place: Place, threads: int) -> tuple[dict[str, Any], list[str], str]:
    """Do a step in a worker process: (its result, its warnings, the host)."""
    host = socket.gethostname()
    seen = look(place.folder, place.token, place.secret, place.inputs)
    check_node(host, seen, place.installed, place.out)
    if Path(place.folder).is_dir():
        os.chdir(place.folder)
    let_threads_sleep()
    os.environ[THREADS] = str(threads)
    importlib.import_module("torch").set_num_threads(threads)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StorageWarning)
        result = do_again(work, quiet=True)
    return result, [str(each.message) for each in caught if issubclass(each.category, StorageWarning)], host


def run_steps(ray: Any, found: Sequence[Node], due: Sequence[Due], place: Place, progress: Progress) -> None:
    """Run steps on the nodes `found`, each as soon as what it refers to is done; at the first error the others are stopped.

    Raises:
        Interrupted: a signal stopped the run.
        CompresskitError: a step's own error, or a step's worker died too often, or no node that is left can take it.
    """
    waiting = {each.step.name: each for each in due}
    running: dict[Any, Due] = {}
    alive = {node.key: node for node in found}
    remote = ray.remote(_task)
    try:
        while waiting or running:
            undone = {*waiting, *(each.step.name for each in running.values())}
            for each in [each for each in waiting.values() if not undone & set(each.step.references)]:
                running[_submitted(remote, each, place, progress)] = waiting.pop(each.step.name)
            for reference in ray.wait(list(running), timeout=LOOK_SECONDS)[0]:
                _finish(ray, reference, running[reference].step, progress)
                del running[reference]
            alive = _still_alive(ray, alive, [*running.values(), *waiting.values()], progress.say)
    except BaseException as error:
        _cancel(ray, list(running))
        if isinstance(error, KeyboardInterrupt):
            raise progress.interrupted([each.step.name for each in running.values()]) from error
        raise


def _submitted(remote: Any, due: Due, place: Place, progress: Progress) -> Any:
    """The reference of a step that is recorded as running and handed to Ray."""
    work, taken = progress.start(due.step), due.needs
    options = remote.options(
        num_cpus=taken.cpus, num_gpus=taken.gpus, memory=taken.memory or None, max_retries=RETRIES, name=due.step.name
    )
    return options.remote(work, place, taken.cpus)


def _finish(ray: Any, reference: Any, step: Step, progress: Progress) -> None:
    """Record what a task gave, and pass its warnings on; raises its own error, or CompresskitError where Ray lost it."""
    try:
        result, warned, host = _result(ray, reference, step)
    except Exception:
        progress.fail(step)
        raise
    for text in warned:
        warnings.warn(text, StorageWarning, stacklevel=2)
    progress.finish(step, result, host)


def _result(ray: Any, reference: Any, step: Step) -> tuple[dict[str, Any], list[str], str]:
    """What a task gave; raises its own error, or CompresskitError where Ray lost it."""
    lost = ray.exceptions
    try:
        found: tuple[dict[str, Any], list[str], str] = ray.get(reference)
    except lost.RayTaskError as error:
        raise error.cause from error
    except lost.OutOfMemoryError as error:
        raise CompresskitError(
            f"step {step.name!r}: its node ran out of memory; lower samples or sequence_length; the same command goes on"
        ) from error
    except (lost.WorkerCrashedError, lost.NodeDiedError) as error:
        what = "node" if isinstance(error, lost.NodeDiedError) else "worker process"
        raise CompresskitError(
            f"step {step.name!r}: its {what} died, {RETRIES + 1} times in all; look at that machine; the same command goes on"
        ) from error
    except lost.RayError as error:
        raise CompresskitError(f"step {step.name!r}: Ray lost it ({first_line(error)}); the same command goes on") from error
    return found


def _still_alive(ray: Any, before: Mapping[str, Node], left: Sequence[Due], say: Callable[[str], None]) -> dict[str, Node]:
    """The nodes that are alive; raises CompresskitError if one has died and no other can take one of the steps that are left."""
    alive = {node.key: node for node in nodes_of(ray)}
    died = [node for key, node in before.items() if key not in alive]
    for each in left if died else ():
        if not any(each.needs.fit(node) for node in alive.values()):
            raise CompresskitError(
                f"node {died[0].name} died, and no other has {each.needs}, which step {each.step.name!r} needs; "
                "the same command goes on when there is one"
            )
    for node in died:
        say(f"compresskit: warning: node {node.name} died; the steps that ran there run again on another")
    return alive


def _cancel(ray: Any, references: list[Any]) -> None:
    """Stop tasks: as Ctrl-C does, so that they leave what they have done, and by force those that do not end in time."""
    for force in (False, True):
        for reference in references:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it has ended meanwhile
                ray.cancel(reference, force=force)
        references = ray.wait(references, num_returns=len(references), timeout=CANCEL_SECONDS)[1] if references else []
