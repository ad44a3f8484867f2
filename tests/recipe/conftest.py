"""Fixtures of the tests of recipes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from recipe_runs import TEXT, Make

from compresskit.recipe.reading import load
from compresskit.recipe.run import run


@pytest.fixture
def make(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> Make:
    """Write the recipe, over a copy of the tiny llama that a test may change."""
    source = tmp_path / "model"
    shutil.copytree(tiny["llama"], source)

    def write(rank: int = 2, content: str = TEXT) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content.format(source=source, text=text_file, rank=rank))
        return path

    return write


@pytest.fixture(scope="session")
def finished(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and a run of it, `out`: to be copied, not to be changed."""
    root = tmp_path_factory.mktemp("finished")
    (root / "recipe.yaml").write_text(TEXT.format(source=tiny["llama"], text=text_file, rank=2))
    run(load(root / "recipe.yaml"), root / "out")
    return root


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """The recipe of a run that has finished in `out` beside it."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "recipe.yaml"
