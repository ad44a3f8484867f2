"""distributed.py: the same bytes for any number of processes, and one line where one of them fails."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compresskit import distributed
from compresskit.cli.application import called
from compresskit.errors import RequestError
from compresskit.walk import cost
from tests.tiny_models import make_model

TESTS = Path(__file__).parent
TEXT = " ".join(f"the {number} foxes jump over {number * 7 % 13} dogs, and the dogs sleep." for number in range(60))


SETTINGS = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


def torchrun(processes: int, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command in several processes, as torchrun does."""
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(free_port()),
    ]
    environment = os.environ | SETTINGS
    return subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    make_model(folder / "model", "llama")
    make_model(folder / "experts", "qwen3_moe")
    (folder / "text.txt").write_text(TEXT)
    words = TEXT.split()
    rows = [{"instruction": " ".join(words[i : i + 4]), "output": " ".join(words[i + 9 : i + 9 + i % 7 + 2])} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_bytes(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches of text and two for the closing divergence: then the third rank has none."""
    pytest.importorskip("peft")
    from tests import rank_runs

    monkeypatch.setattr(cost, "MICRO_BATCH_BYTES", rank_runs.MICRO_BATCH_BYTES)
    monkeypatch.setattr("compresskit.recovery.training.finetune.MICRO_BATCH_TOKENS", rank_runs.MICRO_BATCH_TOKENS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rank_runs.run_all(work, work / "1")
    torch.set_num_threads(threads)
    expected = rank_runs.digests(work / "1")
    assert {name.partition("/")[0] for name in expected} == set(rank_runs.RUNS)
    rank_runs.run_ranks(3, free_port(), work, work / "3")
    assert rank_runs.digests(work / "3") == expected


@pytest.mark.slow
def test_a_rank_that_fails_ends_the_run_with_one_line(work: Path) -> None:
    """The first rank sees a full disk; the others are in an exchange meanwhile."""
    command = ["prune", "cfsp", str(work / "model"), "/dev/full/out", "--calibration", str(work / "text.txt")]
    run = torchrun(2, "-m", "compresskit", *command, "--samples", "4", "--sequence-length", "16")
    said = [line for line in run.stderr.splitlines() if line.startswith("compresskit: error")]
    assert run.returncode != 0 and len(said) == 1 and "/dev/full" in said[0]


@pytest.mark.parametrize("words", ["quantize compeft", "run demo"])
def test_commands_that_share_nothing_are_refused(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RequestError, match=f"^{words}: does not share its work among processes, .*; start it without torchrun$"):
        called([*words.split(), "model", "out"], completing=False)


def test_without_torchrun_every_exchange_is_nothing() -> None:
    value = torch.arange(6.0)
    assert distributed.count() == 1 and distributed.is_first() and distributed.is_first_to_fail()
    assert torch.equal(distributed.total(value), torch.arange(6.0))
    assert distributed.every("x") == ["x"] and distributed.in_order([3, 4], 2) == [3, 4]
    assert list(distributed.own(3)) == [0, 1, 2]
    assert list(distributed.pieces(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert distributed.add_in_order(None, value, value, [0], 0) is value
    distributed.add_everywhere(total := torch.zeros(6), value, 1)
    assert torch.equal(total, value)
    assert distributed.from_first(lambda: 5) == 5 and distributed.after_first(lambda: 6) == 6
