"""Runs command lines in forks of a process that has imported everything, one fault in each; started by fault_harness.py.

Reads one JSON object a line: {"arguments", "log", "fault": {"below", "call", "kind", "number"} or null}. Answers with one:
{"code": the exit code or minus the signal, "calls": how many calls touched a file below the folder, "blocks": how many blocks
the command finished}; the last two are null where it was killed.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from typing import Any

KINDS = {"count": 0, "fail": 1, "fail from here": 2, "short write": 3, "signal before": 4, "signal after": 5}
LIBRARIES = [
    "torch", "transformers", "transformers.models.llama.modeling_llama", "peft", "accelerate", "scipy.special",
    "compresskit.cli.main", "compresskit.api", "compresskit.job", "compresskit.pruning.run", "compresskit.pruning.walk",
    "compresskit.quantization.run", "compresskit.quantization.sequential", "compresskit.quantization.two_streams",
    "compresskit.quantization.apiq.method", "compresskit.compensation.run", "compresskit.compensation.walk",
    "compresskit.evaluation.run", "compresskit.evaluation.language_modelling", "compresskit.recovery.run",
    "compresskit.recovery.training.finetune", "compresskit.recovery.training.trainer", "compresskit.recovery.output",
    "compresskit.task_vectors.compress", "compresskit.task_vectors.expand", "compresskit.task_vectors.merge",
    "compresskit.recipe.run", "compresskit.report.page",
]  # fmt: skip


def main() -> None:
    import torch

    torch.set_num_threads(1)
    for name in LIBRARIES:
        importlib.import_module(name)
    _warm_up()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_run(json.loads(line))) + "\n")
        sys.stdout.flush()


def _warm_up() -> None:
    """What the first use of torch, its optimisers and the command line imports."""
    import torch

    from compresskit.cli.application import application
    from compresskit.methods import METHODS, method_class, options_class

    for stage, entries in METHODS.items():
        for name in entries:
            method_class(stage, name), options_class(stage, name)
    application(())
    weight = torch.nn.Parameter(torch.eye(4))
    optimizer = torch.optim.AdamW([weight])
    (weight @ weight).sum().backward()
    optimizer.step()
    torch.linalg.eigh(torch.eye(3))


def _run(asked: dict[str, Any]) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(asked, writing)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        told = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, **(json.loads(told) if told else {"calls": None, "blocks": None})}


def _child(asked: dict[str, Any], told: int) -> None:
    shim = ctypes.CDLL(None)
    log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((null, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    blocks = _count_blocks()
    fault = asked["fault"]
    code = 70
    try:
        if fault:
            log_name = asked["log"] + ".fault"
            shim.fault_arm(
                fault["below"].encode(), ctypes.c_long(fault["call"]), KINDS[fault["kind"]], fault["number"], log_name.encode()
            )
        code = _main(asked["arguments"])
    finally:
        shim.fault_disarm()
        shim.fault_count.restype = ctypes.c_long
        os.write(told, json.dumps({"calls": shim.fault_count(), "blocks": len(blocks)}).encode())
        os._exit(code)


def _main(arguments: list[str]) -> int:
    from compresskit.cli.main import main

    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    try:
        main(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return 0


def _count_blocks() -> list[int]:
    """The blocks that the command finishes, as it finishes them."""
    from compresskit.checkpoint.writer import Writer

    finished: list[int] = []
    finish_block = Writer.finish_block

    def counted(self: Writer, index: int, facts: dict[str, Any]) -> None:
        finish_block(self, index, facts)
        finished.append(index)

    Writer.finish_block = counted  # type: ignore[method-assign]
    return finished


if __name__ == "__main__":
    main()
