"""The progress of a run: which steps are due and why, and the record of each as it starts and ends. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compresskit.errors import Interrupted
from compresskit.recipe.reading import Recipe
from compresskit.recipe.state import OUTDATED, RUNNING, State
from compresskit.recipe.steps import Step
from compresskit.recipe.work import Work, recovered_result, work_of

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
    on: str | None = None
    """Where: None in this process, `ray` or `ray:ADDRESS` on a cluster."""


@dataclass
class Progress:
    """A run as it goes on; only the process that owns the run has one."""

    recipe: Recipe
    state: State
    wanted: Wanted
    say: Say
    keys: Mapping[str, str]
    """Of all steps, by name."""
    ran: list[str] = field(default_factory=list)
    """Names of the steps that have run, in the order in which they ended."""

    def reason(self, step: Step) -> str | None:
        """Reason why the step must run; None if it can be skipped."""
        first, only = self.wanted.first, self.wanted.only
        names = [each.name for each in self.recipe.steps]
        asked = only == step.name or (first is not None and names.index(step.name) >= names.index(first))
        if only is not None or asked:
            return "asked for" if asked else None
        found = self.state.steps.get(step.name)
        if found is None:
            return "not run yet"
        if found["status"] == OUTDATED:
            return "asked for"
        if found["key"] != self.keys[step.name]:
            return "its settings or inputs have changed"
        if self.state.is_done(step, self.keys[step.name]):
            return None
        return "was interrupted" if found["status"] == RUNNING else "its output is gone or was changed"

    def is_due(self, step: Step) -> bool:
        """Whether the step must run; says so, and records what had finished when a run was killed."""
        reason = self.reason(step)
        if reason is not None:
            self.say(f"{self._position(step)}: {step.title} ({reason})")
        elif self.wanted.only is None and self.state.steps[step.name]["status"] == RUNNING:
            self.say(f"{self._position(step)}: had finished when the run was stopped")
            self.state.finish(step, recovered_result(step, self.state.folder(step.name)))
        elif self.wanted.only is None:
            self.say(f"{self._position(step)}: unchanged, skipped")
        return reason is not None

    def start(self, step: Step) -> Work:
        """Record that the step is running; the work that it has."""
        goes_on = self.state.begin(step, self.keys[step.name])
        return work_of(step, self.state, goes_on)

    def finish(self, step: Step, result: dict[str, Any], where: str = "") -> None:
        """Record that the step has ended, with its result; `where`: on which machine, if that is to be said."""
        self.state.finish(step, result)
        self.ran.append(step.name)
        if where:
            self.say(f"{self._position(step)}: done on {where}")
        if warning := self.state.steps[step.name]["result"].get("warning"):
            self.say(f"compresskit: warning: {step.name}: {warning}")

    def fail(self, step: Step) -> None:
        """Say that the step has failed, where others that ran beside it stop with it; its record stays as it was."""
        self.say(f"{self._position(step)}: failed")

    def interrupted(self, names: Sequence[str]) -> Interrupted:
        """The error that says in which steps a run was stopped, and how it goes on."""
        how = "the same command without --overwrite" if self.wanted.overwrite else "the same command"
        steps = f"step{'s' * (len(names) > 1)} {', '.join(map(repr, names))}"
        return Interrupted(f"interrupted in {steps}; {how} goes on from there")

    def _position(self, step: Step) -> str:
        return f"[{self.recipe.steps.index(step) + 1}/{len(self.recipe.steps)}] {step.name}"
