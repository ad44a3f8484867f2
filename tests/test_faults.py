"""Whole commands under faults of the disk and signals. End to end.

A sample of what `benchmarks/storage.py faults` draws; fault_harness.py has the invariants.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_harness import Nursery, Room, Scene, compiled_shim, faults

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    folder = tmp_path_factory.mktemp("faults")
    shim = compiled_shim(folder)
    if shim is None:
        pytest.skip("takes a C compiler on Linux")
    with Nursery(shim, folder / "cache") as nursery:
        room = Room(folder / "room", nursery)
        room.prepare()
        yield room


@pytest.mark.parametrize(
    ("name", "overwrites", "count"),
    [("prune", True, 4), ("run", True, 2)],
)
def test_a_sample_of_faults_breaks_no_invariant(name: str, overwrites: bool, count: int, room: Room) -> None:
    scene = Scene(room, name, overwrites)
    assert [each for fault in faults(scene, count, 0) for each in scene.trial(*fault)] == []


def test_the_harness_sees_a_folder_that_appears_half(room: Room, tmp_path: Path) -> None:
    """A judge that finds nothing proves nothing: it must find fault with a writer that writes under the final name."""
    scene = Scene(room, "prune", overwrites=False)
    room.fresh(scene.template)
    (room.trial / "out").mkdir()
    (room.trial / "out" / "model.safetensors").write_bytes(b"half")
    (room.trial / "photographs" / "sea.jpg").unlink()
    found = {"code": -signal.SIGKILL, "printed": ""}
    assert list(scene._judge_out(found)) == ["OUT is neither the old one nor the new one", "something else has changed"]
    said = {"code": 1, "printed": "Traceback (most recent call last):\nOSError: no space\n"}
    assert next(iter(scene._judge_message(said, "fail"))) == "a traceback"
