"""checkpoint/read_ahead.py: afterwards the bytes are in the page cache; of files that are gone nothing is said. End to end."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event

import pytest
from tiny_models import make_model

from compresskit.checkpoint.read_ahead import held_names, read_ahead
from compresskit.checkpoint.reader import open_checkpoint

MOST_BYTES = 1 << 16
"""Of a read that asks whether bytes are cached: a page or two are enough."""


def is_cached(path: Path, start: int) -> bool:
    """Whether a read at this byte would not wait for the disk."""
    with path.open("rb") as file:
        try:
            return os.preadv(file.fileno(), [bytearray(1)], start, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            return False
        except OSError:
            pytest.skip("this file system does not tell what is cached")


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="Linux tells what is cached")
def test_a_block_s_bytes_are_cached(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama", num_hidden_layers=2, hidden_size=512, intermediate_size=4096)
    store, file = open_checkpoint(model), model / "model.safetensors"
    header = store.headers[file]
    middles = {name: header.starts[name] + header.specs[name].bytes // 2 for name in store.tensors if "mlp" in name}
    drop(file)
    if any(is_cached(file, middle) for middle in middles.values()):
        pytest.skip("this file system keeps everything in memory")
    read_ahead(store, held_names(store, "model.layers.1."), Event())
    assert {name for name, middle in middles.items() if is_cached(file, middle)} >= {name for name in middles if ".1." in name}


def test_reading_ahead_of_what_is_gone_or_changed_says_nothing(tmp_path: Path) -> None:
    store = open_checkpoint(make_model(tmp_path / "model", "llama"))
    names = held_names(store, "model.layers.0.")
    assert names
    file = store.files[0]
    os.utime(file, ns=(1, 1))
    read_ahead(store, names, Event())
    file.unlink()
    read_ahead(store, names, Event())
