"""cli/main.py: what is loaded, completion, near misses, interrupts. End to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from conftest import Run

from compresskit.errors import StorageWarning


def compresskit(*arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compresskit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)  # type: ignore[call-overload, no-any-return]


def test_help_loads_no_torch() -> None:
    script = (
        "import sys, compresskit.cli.main as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
        "print('torch' in sys.modules, 'pydantic' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines()[-1] == "False False"


@pytest.mark.parametrize(
    ("typed", "wanted"), [("compresskit pru", "prune"), ("compresskit prune cf", "cfsp"), ("x inspect a --js", "--json")]
)
def test_the_shell_completes_commands_methods_and_flags(typed: str, wanted: str) -> None:
    asked = {"_COMPRESSKIT_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    assert compresskit(env={**os.environ, **asked}).stdout.split() == [wanted]


def test_refusals_load_no_torch(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    script = (
        f"import sys, compresskit.cli.main as c\ntry: c.main(['prune', 'cfsp', {str(model)!r}, {str(tmp_path / 'o')!r}])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.splitlines() == ["2 False"]


def test_an_unknown_method_names_the_near_miss(run: Run, model: Path, tmp_path: Path) -> None:
    code, _, err = run("prune", "cfps", model, tmp_path / "out")
    assert code == 2
    assert "cfsp" in err
    assert err.count("\n") == 1


def test_an_interrupt_that_a_library_made_an_error_of_its_own_still_is_an_interrupt(
    run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: object, **__: object) -> dict[str, object]:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise RuntimeError("worker failed") from None
        raise AssertionError("nobody listens to SIGTERM")

    monkeypatch.setattr("compresskit.cli.stages.runner", lambda stage, name: stopped)
    code, _, err = run("prune", "cfsp", model, tmp_path / "out")
    assert code == 130
    assert err.strip() == "compresskit: error: interrupted (RuntimeError: worker failed (--verbose shows where))"


HAIL = """
import os, signal, sys, time

class Hail:
    def find_spec(self, name, *_):
        if name != "{module}" or self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        process = os.getpid()
        if os.fork() == 0:
            os.close(1), os.close(2)
            while os.getppid() == process:
                try: os.kill(process, signal.{stop})
                except ProcessLookupError: break
                time.sleep(0.002)
            os._exit(0)
        time.sleep(0.05)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Hail())
sys.argv = ["compresskit", *{arguments}]
from compresskit.cli.main import main
main()
"""
"""The command line under a hail of signals that begins as it imports a module and lasts until the process is gone."""


@pytest.mark.parametrize("stop", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("module", ["compresskit.errors", "typer", "compresskit.pruning.cfsp"])
def test_a_hail_of_signals_ends_with_one_line_even_while_modules_are_imported(stop: str, module: str) -> None:
    script = HAIL.format(module=module, stop=stop, arguments=["prune", "cfsp", "none", "out"])
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.stderr == "compresskit: error: interrupted\n"
    assert (finished.returncode, finished.stdout) == (130, "")


def test_nohup_protects_from_a_hangup() -> None:
    script = HAIL.format(module="typer", stop="SIGHUP", arguments=["methods"])
    command = ["bash", "-c", f"trap '' HUP; exec {sys.executable} -c \"$0\"", script]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "cfsp" in finished.stdout


RESUMES = "; the same command with --resume goes on"


@pytest.mark.parametrize(
    ("command", "work", "advice"),
    [
        ("prune cfsp a b", "compresskit.pruning.run.prune", RESUMES),
        ("recover paser a b --data c --original d", "compresskit.recovery.run.recover", RESUMES),
        ("quantize compeft a b", "compresskit.task_vectors.compress.compress", ""),
        ("merge ties a b c", "compresskit.task_vectors.merge.merge", ""),
        ("expand a b", "compresskit.task_vectors.expand.expand", ""),
        ("pack a b.ckz", "compresskit.archiving.run.pack", ""),
        ("evaluate a", "compresskit.evaluation.run.evaluate", ""),
        ("inspect a", "compresskit.report.inspect.inspect", ""),
        ("report a", "compresskit.report.collecting.read_result", ""),
        ("plan ci-gate --source a", "compresskit.recipe.plan.plan", ""),
        ("run ci-gate b --source a", "compresskit.recipe.run.run", "; the same command goes on"),
        ("run ci-gate b --source a --dry-run", "compresskit.recipe.run.run", ""),
    ],
)
def test_an_interrupted_command_says_how_it_goes_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, work: str, advice: str
) -> None:
    monkeypatch.setattr(work, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert run(*command.split()) == (130, "", f"compresskit: error: interrupted{advice}\n")


def test_a_storage_warning_is_one_line_and_the_command_goes_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warned(*_: object) -> dict[str, object]:
        for _ in range(2):
            warnings.warn("out: not\nremoved\x1b[2J", StorageWarning, stacklevel=1)
        return {}

    monkeypatch.setattr("compresskit.report.inspect.inspect", warned)
    monkeypatch.setattr("compresskit.report.inspect.listing", lambda found: "done")
    code, out, err = run("inspect", "a")
    assert (code, out) == (0, "done\n")
    assert err == 2 * "compresskit: warning: out: not removed\\x1b[2J\n"
