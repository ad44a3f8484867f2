"""`compresskit` as the snippets of the documentation call it: a program on the PATH.

Most of a short command's seconds are Python's imports. So a command of a stage is carried out by a server, which has the
imports done and forks a process for every command; all other commands start an interpreter of their own.

    python snippet_shell.py serve ADDRESS     the server; it ends with its standard input
    python snippet_shell.py call ARGUMENTS    the program: `compresskit ARGUMENTS` in this folder, with these streams

Settings that only cost time are small (`SMALL`): where a snippet leaves them out, and in recipes that it names. A gate that
a random model misses (exit code 3) is no fault of the snippet where the command has gates: then the code is 0.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

ADDRESS = "SNIPPET_SERVER"
"""Variable of the environment that names the server's socket."""
SMALL = {"samples": 8, "sequence_length": 256, "windows": 2, "epochs": 1, "passes": 20, "verify_windows": 2}
FEWER = {"self_samples": 4}
"""What steps of a recipe set, with a smaller value."""
STAGES = ("prune", "quantize", "compensate", "recover", "evaluate", "merge", "expand", "pack", "search", "run", "plan")


def reduced(arguments: list[str], scratch: Path) -> list[str]:
    """The command with small values for what it leaves out, or with a copy of the recipe that has them, made in `scratch`."""
    from compresskit.methods import METHODS

    stage = arguments[0]
    name = arguments[1] if stage in METHODS and len(arguments) > 1 else ""
    if stage == "run":
        return [stage, *(_small_recipe(each, scratch) for each in arguments[1:2]), *arguments[2:]]
    if name not in METHODS.get(stage, {"": None}) or (stage not in METHODS and stage not in ("evaluate", "search")):
        return arguments
    flags = {f"--{key.replace('_', '-')}": value for key, value in _small(stage, name).items()}
    return arguments + [f"{flag}={value}" for flag, value in flags.items() if flag not in arguments]


def _small(stage: str, name: str) -> dict[str, int]:
    from compresskit.methods import METHODS, method_class, options_class

    known = {*options_class(stage, name).model_fields, *(method_class(stage, name).model_fields if stage in METHODS else ())}
    return {key: value for key, value in SMALL.items() if key in known}


def _small_recipe(recipe: str, scratch: Path) -> str:
    """The copy with small values of a shipped recipe, or of one in this folder, beside it; any other argument as it is."""
    import yaml

    from compresskit.recipe import shipped

    if recipe in shipped.names():
        path, copy = shipped.find(recipe), scratch / f"{recipe}.yaml"
        for file in shipped.folder().glob("*.jsonl"):
            shutil.copy(file, scratch)
    elif recipe.endswith(".yaml"):
        path, copy = Path(recipe), Path(recipe).with_name(f"small-{Path(recipe).name}")
    else:
        return recipe
    document = yaml.safe_load(path.read_text())
    for step in document["steps"]:
        stage = next(key for key in step if key not in ("name", "source"))
        step.update(_small(stage, step[stage] or "") | {key: few for key, few in FEWER.items() if key in step})
    copy.write_text(yaml.safe_dump(document, sort_keys=False))
    return str(copy)


def call(arguments: list[str]) -> int:
    """Let the server do a stage's command, or replace this process by Python; the exit code."""
    if not arguments or arguments[0] not in STAGES or ADDRESS not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "compresskit", *arguments])
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        request = {"folder": str(Path.cwd()), "arguments": arguments}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        code = server.recv(1)
    return code[0] if code else 1


def serve(address: str) -> None:
    """Fork a process for every command that comes in, until standard input ends."""
    _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes that have ended leave no trace
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                code = 1
                try:
                    code = _carry_out(connection)
                finally:
                    connection.sendall(bytes([code]))
                    os._exit(code)
            connection.close()
    os.killpg(0, signal.SIGKILL)


def _carry_out(connection: socket.socket) -> int:
    from compresskit.cli.main import main

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, streams, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    request: dict[str, Any] = json.loads(data)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(request["folder"])
    code = 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            main(reduced(request["arguments"], Path(scratch)))
        except SystemExit as ended:
            code = int(ended.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    gated = request["arguments"][0] == "run" or "--gate" in request["arguments"]
    return 0 if code == 3 and gated else code


def _import_everything() -> None:
    import importlib
    import pkgutil

    import compresskit

    for found in pkgutil.walk_packages(compresskit.__path__, "compresskit."):
        if not found.name.endswith(("__main__", "panel_kernel")):  # the latter needs triton
            importlib.import_module(found.name)
    for name in ("transformers.models.llama.modeling_llama", "transformers.trainer", "peft", "accelerate", "scipy.sparse.linalg"):
        importlib.import_module(name)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder, where `evaluate` and others are tests
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(call(sys.argv[2:]))
