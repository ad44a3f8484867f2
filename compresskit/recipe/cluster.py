"""Run the steps of a recipe on a Ray cluster: a task a step, as many side by side as the cluster has room for.

The process that calls `run_steps` alone writes the run's state and record. A task gets a `Work` and writes its step's folder.
Ray starts a task again whose worker or node died, and the task goes on with what the dead one left. The only file that
imports Ray.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from compresskit.checkpoint.whole_files import write_whole
from compresskit.errors import RequestError
from compresskit.machine.interrupts import STOPPING
from compresskit.recipe import nodes
from compresskit.recipe.nodes import Node
from compresskit.recipe.steps import Step

ENGINE = "ray"
HOW = "write --on ray, or --on ray:HOST:PORT"
ANSWER_SECONDS = 10
"""Time for a cluster to answer when its address is tried."""
CHECK_SECONDS = 120
"""Time for a node to look whether it can take steps; it starts a Python process for that."""
LOCAL = "local"
RAY_THREADS = "ray_"
"""How the names of Ray's threads in this process begin."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""How a client of HTTP/2, which Ray speaks, begins: the fixed text and empty settings (RFC 9113, section 3.4)."""
SETTINGS = 4
"""Type of the frame with which a server of HTTP/2 answers, in the frame's fourth byte."""


@dataclass(frozen=True)
class Place:
    """What a task compares on its node before it works there, for nodes that came after the check of all."""

    folder: str
    """Of this process; relative paths begin there."""
    token: str
    secret: str
    inputs: Sequence[str]
    installed: Mapping[str, str]
    out: Path


def address_of(on: str) -> str:
    """Read where to run, `ray[:ADDRESS]`.

    Returns:
        The address that is given, else RAY_ADDRESS, else `local`: a cluster for this run alone.

    Raises:
        RequestError: it is neither, or Ray is not installed.
    """
    engine, colon, given = on.partition(":")
    if engine != ENGINE or (colon and not given):
        raise RequestError(f"--on {on}: no such place to run on; {HOW}")
    if importlib.util.find_spec(ENGINE) is None:
        raise RequestError(f"--on {on}: Ray is not installed; pip install 'compresskit[ray]'")
    address = given or os.environ.get("RAY_ADDRESS") or LOCAL
    if address.startswith("ray://"):
        raise RequestError(f"--on {ENGINE}:{address}: a client of Ray is not enough; run on one of the nodes, with --on ray:auto")
    return address


@contextlib.contextmanager
def connected(on: str) -> Iterator[Any]:
    """Connect to the cluster, or start one on this machine that ends with this context; a connection there is, is used.

    Yields:
        The module ray.

    Raises:
        RequestError: no cluster answers, or it is of another version of Ray or Python.
    """
    address = address_of(on)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a run tells nobody of itself
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or Ray warns of a default that will change
    ray = importlib.import_module(ENGINE)
    if ray.is_initialized():
        yield ray
        return
    if address not in (LOCAL, "auto"):
        _check_answer(address)
    handlers = {each: signal.getsignal(each) for each in STOPPING}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
    except (ConnectionError, OSError, RuntimeError, ValueError, SystemExit) as error:
        raise RequestError(f"--on {ENGINE}:{address}: {' '.join(str(error).split()) or 'Ray gave up'}; {HOW}") from error
    finally:
        for each, handler in handlers.items():  # Ray ends the process on SIGTERM, without a word
            signal.signal(each, handler)
    with contextlib.redirect_stdout(_WithoutRay(sys.stdout)):
        try:
            yield ray
        finally:
            ray.shutdown()


class _WithoutRay(io.TextIOBase):
    """Standard output without what Ray's threads print of dead workers and nodes; the run says of that what there is to say."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Write what another thread prints; the number of characters."""
        return len(text) if threading.current_thread().name.startswith(RAY_THREADS) else self.stream.write(text)

    def flush(self) -> None:
        """Flush the stream."""
        self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()


def _check_answer(address: str) -> None:
    """RequestError where no Ray answers at HOST:PORT; Ray itself would try for two minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise RequestError(f"--on {ENGINE}:{address}: is no address; {HOW}")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.settimeout(ANSWER_SECONDS)
            connection.sendall(PREFACE)
            if connection.recv(9)[3:4] != bytes([SETTINGS]):
                raise OSError(None, "what answers there is not the port of ray start")
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(
            f"--on {ENGINE}:{address}: no Ray cluster answers within {ANSWER_SECONDS} seconds ({reason}); start one with "
            "ray start --head, which names its address, HOST:6379"
        ) from error


def nodes_of(ray: Any) -> list[Node]:
    """The nodes that are alive and have processors for steps."""
    found = []
    for each in ray.nodes():
        has = each["Resources"] if each["Alive"] else {}
        if has.get("CPU", 0) >= 1:
            name = f"{each['NodeManagerHostname']} ({each['NodeID'][:8]})"
            found.append(Node(each["NodeID"], name, int(has["CPU"]), int(has.get("GPU", 0)), int(has.get("memory", 0))))
    return found


@contextlib.contextmanager
def checked(ray: Any, found: Sequence[Node], out: Path, steps: Sequence[Step]) -> Iterator[Place]:
    """Let every node look for OUT and for what the steps read, and compare what is installed.

    Yields:
        What tasks compare with, while the context lasts.

    Raises:
        RequestError: a node does not see something, has other versions, or does not answer.
    """
    token, secret = out / ".shared", secrets.token_hex()
    inputs = nodes.read_by(steps)
    given = (str(Path.cwd()), str(token), secret, inputs)
    write_whole(token, secret)
    try:
        installed = nodes.look(*given)["installed"]
        ray.cloudpickle.register_pickle_by_value(nodes)  # a node without compresskit shall be able to say so
        looking = {}
        try:
            for node in found:
                there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node.key, soft=False)
                looking[node] = ray.remote(nodes.look).options(num_cpus=0, scheduling_strategy=there).remote(*given)
        finally:
            ray.cloudpickle.unregister_pickle_by_value(nodes)
        for node, reference in looking.items():
            nodes.check_node(node.name, _answer(ray, node, reference), installed, out)
        yield Place(*given, installed, out)
    finally:
        token.unlink(missing_ok=True)


def _answer(ray: Any, node: Node, reference: Any) -> Mapping[str, Any]:
    """What a node saw; raises RequestError if it does not say."""
    try:
        seen: Mapping[str, Any] = ray.get(reference, timeout=CHECK_SECONDS)
    except ray.exceptions.RayError as error:
        reason = f"no answer within {CHECK_SECONDS} seconds" if isinstance(error, TimeoutError) else first_line(error)
        raise RequestError(f"node {node.name}: cannot be asked what it sees ({reason}); mend it, or take it away") from error
    return seen


def first_line(error: Exception) -> str:
    """Ray's errors have many."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
