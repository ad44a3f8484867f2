"""What a step needs of a node of a cluster, and what keeps a node from doing steps. Neither Ray nor torch.

A node takes steps if it has the resources, sees the run's storage and what the recipe reads, and has the versions of this
machine installed. All is compared before any work.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import RequestError
from compresskit.numerics.units import readable_bytes
from compresskit.recipe.state import exists
from compresskit.recipe.steps import REFERENCE, Step, texts_in

PACKAGE = "compresskit"
COMPARED = (PACKAGE, "torch", "transformers")
"""Packages whose versions decide the bytes."""
OWN_FILES = "files of compresskit"
MISSING = "none"
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True)
class Node:
    """A node of the cluster, as the cluster describes it."""

    key: str
    """The cluster's own name of it."""
    name: str
    """Its host, for people."""
    cpus: int
    gpus: int
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Needs:
    """What a step occupies of a node while it runs."""

    cpus: int
    """Threads, too."""
    gpus: int
    memory: int
    """Bytes; 0 where plan does not know."""

    def __str__(self) -> str:
        parts = [f"{self.cpus} CPU{'s' * (self.cpus > 1)}"]
        parts += [f"{self.gpus} GPU"] if self.gpus else []
        parts += [f"{readable_bytes(self.memory)} of memory"] if self.memory else []
        return ", ".join(parts)

    def fit(self, node: Node) -> bool:
        """Whether a node has as much when nothing else runs there."""
        return self.cpus <= node.cpus and self.gpus <= node.gpus and self.memory <= node.memory


def needs(step: Step, memory: int | None, nodes: Sequence[Node]) -> Needs:
    """Find out what a step occupies; `memory`: its peak in bytes as plan says it, None if unknown.

    Returns:
        One GPU for a step on `cuda`, and for one on `auto` wherever there are any. As many processors as threads:
        OMP_NUM_THREADS, as without a cluster, else the smallest node's share for a step.

    Raises:
        RequestError: the step names one GPU of several, or no node has what it needs.
    """
    device = str(getattr(step.options, "device", "cpu"))
    if device.startswith("cuda:"):
        raise RequestError(f"step {step.name!r}: device {device}: the cluster deals the GPUs; write cuda")
    gpus = int(device == "cuda" or (device == "auto" and any(node.gpus for node in nodes)))
    given = os.environ.get(THREADS, "")
    shares = [node.cpus // max(1, node.gpus if gpus else 1) for node in nodes if node.gpus >= gpus]
    cpus = int(given) if given.isdecimal() and int(given) else max(1, min(shares, default=1))
    found = Needs(cpus, gpus, memory or 0)
    if not any(found.fit(node) for node in nodes):
        largest = "; ".join(str(Needs(node.cpus, node.gpus, node.memory)) + f" on {node.name}" for node in nodes)
        raise RequestError(f"step {step.name!r}: needs {found}, and no node has that ({largest}); {_remedy(found, nodes)}")
    return found


def _remedy(found: Needs, nodes: Sequence[Node]) -> str:
    if all(found.memory > node.memory for node in nodes):
        return "lower samples or sequence_length, or add a larger node"
    if found.gpus and not any(node.gpus for node in nodes):
        return "add a node with a GPU, or write device: cpu"
    return f"set {THREADS} lower, or add a larger node"


def read_by(steps: Iterable[Step]) -> list[str]:
    """Files and folders that steps read and that no step writes, as the recipe names them."""
    texts = [text for step in steps for text in (*step.sources, *texts_in(step.options))]
    texts += [text for step in steps if step.method for text in texts_in(step.method)]
    parts = [part for text in texts if not REFERENCE.search(text) for part in text.split("+")]
    return [part for part in dict.fromkeys(parts) if part and exists(part)]


def look(folder: str, token: str, secret: str, inputs: Sequence[str]) -> dict[str, Any]:
    """What the node on which this runs has; paths are relative to `folder`. It needs nothing but Python there.

    Returns:
        `installed` by package, `sees_out`: whether the file `token` holds `secret`, `missing`: the inputs that are not there.
    """
    file = Path(folder, token)
    sees_out = file.is_file() and file.read_text(encoding="utf-8") == secret
    missing = [each for each in inputs if not Path(folder, Path(each).expanduser()).exists()]
    installed = {}
    for name in COMPARED:
        try:
            installed[name] = importlib.metadata.version(name).partition("+")[0]  # +cpu and +cu128 are the same release
        except importlib.metadata.PackageNotFoundError:
            installed[name] = MISSING
    found = importlib.util.find_spec(PACKAGE)
    content = hashlib.sha256()
    for path in sorted(Path(found.origin).parent.rglob("*.py")) if found and found.origin else ():
        content.update(path.read_bytes())
    installed[OWN_FILES] = content.hexdigest()[:12] if found else MISSING
    return {"installed": installed, "sees_out": sees_out, "missing": missing}


def check_node(name: str, seen: Mapping[str, Any], installed: Mapping[str, str], out: Path) -> None:
    """Compare what a node has with what is `installed` here; raises RequestError with the first thing that differs."""
    differing = [f"{each} {seen['installed'].get(each)} (here {version})" for each, version in installed.items()
                 if seen["installed"].get(each) != version]  # fmt: skip
    if differing:
        raise RequestError(f"node {name}: has {', '.join(differing)}; install there what is installed here")
    if not seen["sees_out"]:
        raise RequestError(f"node {name}: does not see {out}; choose an OUT on storage that all nodes share")
    if seen["missing"]:
        raise RequestError(f"node {name}: does not see {', '.join(seen['missing'])}; put it on storage that all nodes share")
