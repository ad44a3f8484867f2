"""checkpoint/digests.py: hashes computed in threads are those of the files, errors come when asked. Oracle, end to end."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from conftest import SMALL, Run

from compresskit.checkpoint import digests
from compresskit.checkpoint.digests import Digests, beside, sha256
from compresskit.checkpoint.reader import open_checkpoint

ROUND = ("--sparsity", "0.25", "--round-to", "8", "--quiet")


def at_work() -> bool:
    return any(thread.name == "sha256" for thread in threading.enumerate())


def test_digests_are_those_of_hashlib_whatever_thread_computes_them(tmp_path: Path) -> None:
    contents = {tmp_path / str(size): os.urandom(size) for size in (0, 1, digests.CHUNK_BYTES, digests.CHUNK_BYTES + 1)}
    for path, content in contents.items():
        path.write_bytes(content)
    expected = {path: hashlib.sha256(content).hexdigest() for path, content in contents.items()}
    found: Digests = {}
    digests.begin(found, contents)
    assert {path: digest.result(10) for path, digest in found.items()} == expected
    assert {path: sha256(path) for path in contents} == expected


def test_a_file_that_cannot_be_read_fails_where_its_digest_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"b")
    found: Digests = {}
    digests.begin(found, [tmp_path / "a", tmp_path / "b"])
    assert found[tmp_path / "b"].result(10) == hashlib.sha256(b"b").hexdigest()
    with pytest.raises(FileNotFoundError, match="a"):
        found[tmp_path / "a"].result(10)


def test_no_hash_outlives_the_work_beside_which_it_is_computed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "endless")
    found: Digests = {}
    writing = threading.Thread(target=lambda: feed(tmp_path / "endless"), daemon=True)
    writing.start()
    with pytest.raises(KeyboardInterrupt), beside([(found, [tmp_path / "endless"])]):
        raise KeyboardInterrupt
    assert not found
    writing.join(10)
    assert not writing.is_alive()


def feed(pipe: Path) -> None:
    """Write until nobody reads."""
    try:
        with pipe.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
    except BrokenPipeError:
        return


def test_a_damaged_source_is_named_after_the_work_began_and_nothing_is_left(
    run: Run, model: Path, text_file: Path, tmp_path: Path
) -> None:
    text = ("--calibration", text_file, *SMALL)
    first, out = tmp_path / "first", tmp_path / "out"
    assert run("prune", "magnitude", model, first, *ROUND, *text)[0] == 0
    store = open_checkpoint(first)
    known = store.hashes
    content = bytearray((first / "model.safetensors").read_bytes())
    content[-4] ^= 1  # of the last weight's mantissa: no reader can see it
    (first / "model.safetensors").write_bytes(content)
    assert (store.hashes, open_checkpoint(first).hashes == known) == (known, False)
    code, _, err = run("prune", "cfsp", first, out, *ROUND, *text)
    assert (code, err.count("\n")) == (2, 1)
    assert "model.safetensors: SHA-256 is" in err
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    assert not at_work()


def test_a_source_that_changed_is_not_resumed(
    run: Run, model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("prune", "cfsp", model, tmp_path / "out", *ROUND, "--calibration", text_file, *SMALL)
    with monkeypatch.context() as stopped:
        stopped.setattr("compresskit.checkpoint.folder.commit", interrupted)
        assert run(*arguments)[0] == 130
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, _, err = run(*arguments, "--resume")
    assert (code, err.count("\n")) == (2, 1)
    assert "left by a run with other inputs" in err
    (model / "model.safetensors").write_bytes(content)
    assert run(*arguments, "--resume")[0] == 0


def interrupted(work: object) -> None:
    raise KeyboardInterrupt
