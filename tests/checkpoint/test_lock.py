"""checkpoint/lock.py: one holder at a time, named; a dead one holds nothing. Property and end to end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compresskit.checkpoint.lock import acquire, check_unlocked, locked
from compresskit.errors import RequestError, StorageError

HOLD = """
import sys
from pathlib import Path
from compresskit.checkpoint.lock import acquire
acquire(Path(sys.argv[1]), Path("OUT"))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_with_the_first_one_s_process_and_host(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(lock)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    said = f"OUT: process {child.pid} on {socket.gethostname()} is at work in it"
    for attempt in (lambda: acquire(lock, Path("OUT")), lambda: check_unlocked(lock, Path("OUT"))):
        with pytest.raises(RequestError, match=said):
            attempt()
    child.kill()
    child.communicate()
    check_unlocked(lock, Path("OUT"))
    os.close(acquire(lock, Path("OUT")))
    assert json.loads(lock.read_text())["process"] == os.getpid()


def test_of_many_threads_one_holds_it_at_a_time(tmp_path: Path) -> None:
    inside, most, refused = 0, 0, 0
    guard = threading.Lock()

    def work() -> None:
        nonlocal inside, most, refused
        for _ in range(50):
            try:
                with locked(tmp_path / "lock", tmp_path):
                    with guard:
                        inside += 1
                        most = max(most, inside)
                    with guard:
                        inside -= 1
            except RequestError:
                refused += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert refused < 200


def test_a_lock_whose_file_the_holder_removes_is_not_taken_on_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = acquire(path, tmp_path)
    taken: list[int] = []
    waiting = threading.Thread(target=lambda: taken.append(acquire(path, tmp_path)))
    waiting.start()
    path.unlink()
    os.close(first)
    waiting.join()
    assert os.path.samestat(os.fstat(taken[0]), path.stat())
    os.close(taken[0])


def test_nothing_is_made_by_looking(tmp_path: Path) -> None:
    check_unlocked(tmp_path / "lock", tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_link_in_the_lock_s_place_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "secret"
    target.write_text("secret")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(StorageError, match="lock: cannot be opened"):
        acquire(tmp_path / "lock", tmp_path)
    assert target.read_text() == "secret"
