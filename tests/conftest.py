"""Fixtures that every test file shares."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from compresskit.cli.main import main

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--samples", "8", "--sequence-length", "64")
"""Flags for calibration with little text."""

if "PYTEST_XDIST_WORKER" in os.environ:
    import torch  # here and below, because the process that only hands out the tests needs none of it

    # Test processes run side by side: spinning threads of the one would slow the other, and its children.
    torch.set_num_threads(1)
    os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

settings.register_profile("noisy", deadline=None)
settings.load_profile("noisy")


def pytest_collection_finish() -> None:
    """What has been imported and collected stays: the cycle collector need not look through it before every step of a recipe."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # it imports them sooner or later
        from compresskit.machine.libraries import import_networks

        import_networks()
    gc.freeze()


TEXT = "the quick brown fox jumps over a lazy dog while seven quiet engineers measure how small a model can be"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by family, made when first asked for."""
    from tiny_models import make_model

    root = tmp_path_factory.mktemp("tiny")

    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = make_model(root / family, family)
            return self[family]

    return Models()


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40,000 characters of prose-like text: enough for 64 windows of 128 byte tokens."""
    import torch

    path = tmp_path_factory.mktemp("text") / "prose.txt"
    words = TEXT.split()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(words), (8000,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in picks)[:40000])
    return path


@pytest.fixture(scope="module")
def own_structures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for these tests: structures that an earlier state of the code derived are not read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESSKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture
def model(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(tiny["llama"], tmp_path / "model"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()  # what making the tiny models printed
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return int(caught.value.code or 0), output.out, output.err

    return call
