"""The command line in processes whose libraries are imported already: twenty can be started, and killed, in a minute."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerProcess
from pathlib import Path

LIBRARIES = ["torch", "transformers", "transformers.models.llama.modeling_llama", "compresskit.api"]


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


def _run(arguments: list[str], log: Path) -> None:
    from compresskit.cli.main import main

    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    main(arguments)
