"""job.py: the same request gives the same bytes, with one thread or two, at once or resumed. Property; docs/determinism.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Run
from small_runs import slow_but

from compresskit.checkpoint.writer import Writer
from compresskit.methods import METHODS, options_class

RESUMABLE = [
    (stage, name)
    for stage in ("prune", "quantize", "compensate")
    for name in METHODS[stage]
    if "resume" in options_class(stage, name).model_fields
]
"""The methods whose runs go on block by block. How `recover` goes on is tested in tests/recovery."""
CASES = [*RESUMABLE, ("quantize", "gptq mixed"), ("quantize", "apiq mixed")]
"""(stage, name of the method and of a variant)."""
RESUMED = [case for case in CASES if case[1] in ("nf4", "gptq mixed", "apiq mixed", "corda")]
"""A method for each way of going on; tests/pruning and tests/quantization kill `cfsp` and `gptq`."""
ONCE = [case for case in CASES if case[1] in ("gptq", "eora")]
"""A method for each kind of work; the others share their walks and solvers."""
SETTINGS = {
    "flap": ("--allocation", "global"),
    "rtn": ("--bits", 3, "--group-size", 16),
    "gptq": ("--bits", 3, "--group-size", 16),
    "gptq mixed": ("--bits", 2.5, "--group-size", 16),
    "apiq mixed": ("--bits", 2.5, "--group-size", 16, "--epochs", 1),
    "apiq": ("--bits", 3, "--group-size", 16, "--epochs", 1, "--rank", 2, "--adapter-bits", 8),
    "eora": ("--rank", 4, "--aim", "block", "--merge"),
    "act": ("--rank", 4, "--adapter-bits", 8),
    "corda": ("--rank", 4),
    "svd": ("--rank", 4),
}
METHOD_MISSED = (0, 3)
"""Exit codes of a run that wrote its output: a random model in few bits may miss the stage's own gate."""


@pytest.fixture
def command(tiny: dict[str, Path], text_file: Path, run: Run, tmp_path: Path, method: tuple[str, str]) -> list[Any]:
    """A method's command with OUT left out: (stage, name, source, flags)."""
    stage, name = method
    source, given = tiny["llama"], [*SETTINGS.get(name, ()), "--calibration", text_file, *SMALL]
    name = name.partition(" ")[0]
    if stage == "compensate":
        given += ["--original", source]
        if name != "corda":
            rounded = tmp_path / "rounded"
            assert (
                run("quantize", "rtn", source, rounded, *SETTINGS["rtn"], "--calibration", text_file, *SMALL)[0] in METHOD_MISSED
            )
            source = rounded
    return [stage, name, source, given]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def written(run: Run, command: list[Any], out: Path, *more: str) -> dict[str, bytes]:
    """Run a command; the weights and configurations that it writes."""
    stage, name, source, given = command
    code, _, err = run(stage, name, source, out, *given, *more)
    assert code in METHOD_MISSED, err
    files = [*out.rglob("*.safetensors"), *out.rglob("*config.json")]
    return {str(path.relative_to(out)): path.read_bytes().replace(bytes(out.resolve()), b"OUT") for path in files}


@pytest.mark.parametrize("method", slow_but(("quantize", "gptq"), of=ONCE), ids="-".join)
def test_the_bytes_are_the_same_again_and_with_two_threads(run: Run, command: list[Any], tmp_path: Path) -> None:
    found = []
    for number, threads in enumerate((1, 1, 2)):
        torch.set_num_threads(threads)
        found.append(written(run, command, tmp_path / f"out-{number}"))
    assert found[0] == found[1], "two runs differ"
    assert found[0] == found[2], "one thread and two differ"


@pytest.mark.parametrize("method", slow_but(("quantize", "nf4"), ("compensate", "corda"), of=RESUMED), ids="-".join)
def test_a_resumed_run_gives_the_bytes_of_an_undisturbed_one(
    run: Run, command: list[Any], method: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Writer.finish_block

    def interrupted(writer: Writer, index: int, facts: dict[str, Any]) -> None:
        finish(writer, index, facts)
        if index == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish_block", interrupted)
        stage, name, source, given = command
        assert run(stage, name, source, tmp_path / "twice", *given)[0] == 130
    assert not (tmp_path / "twice").exists()
    assert written(run, command, tmp_path / "twice", "--resume") == written(run, command, tmp_path / "once")
