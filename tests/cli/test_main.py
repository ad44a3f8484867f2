"""cli/main.py: what is loaded, completion, near misses, interrupts. End to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run


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
