"""The command line in processes whose libraries are imported already: twenty can be started, and killed, in a minute."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from compresskit.checkpoint.work_folder import WorkFolder

LIBRARIES = [
    "torch", "transformers", "transformers.models.llama.modeling_llama", "compresskit.api", "compresskit.pruning.run",
    "compresskit.quantization.run", "compresskit.compensation.run", "compresskit.evaluation.run",
]  # fmt: skip


def start(arguments: list[str], log: Path) -> ForkServerProcess:
    """Run `compresskit ARGUMENTS`; what it prints goes to the end of `log`.

    The processes are forks of a server that has imported the libraries and nothing else: the tests' own process has
    threads, which a fork does not survive.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    process = context.Process(target=_run, args=(arguments, log))
    process.start()
    return process


def finish(arguments: list[str], log: Path) -> None:
    """Run `compresskit ARGUMENTS` to its end, which must be a good one."""
    process = start(arguments, log)
    process.join()
    assert process.exitcode == 0, log.read_text()


def interrupt(arguments: list[str], out: Path, log: Path, stop: signal.Signals) -> int | None:
    """Run `compresskit ARGUMENTS`, which write `out`, stop it when two blocks are finished; its exit code."""
    progress = WorkFolder(out).progress
    process = start(arguments, log)
    while process.is_alive() and not (progress.exists() and len(json.loads(progress.read_text())["blocks"]) >= 2):
        time.sleep(0.01)
    assert process.pid is not None and process.is_alive(), log.read_text()
    os.kill(process.pid, stop)
    process.join()
    assert not out.exists(), "it came to its end before it was stopped"
    assert progress.exists()
    return process.exitcode


def _run(arguments: list[str], log: Path) -> None:
    from compresskit.cli.main import main

    # A test run in the background passes on an ignored SIGINT, which its children would ignore too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    main(arguments)
