"""The documentation site builds without a warning, and its reference has everything that the code has. End to end."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit import errors
from compresskit.methods import METHODS, method_class, options_class

pytestmark = pytest.mark.slow  # the site takes seconds to build, in every worker
DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("sphinx", reason="building the site takes the extra compresskit[docs]")
    root = tmp_path_factory.mktemp("site")
    before = sorted(DOCS.rglob("*"))
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "--keep-going",
        "-q",
        "-d",
        str(root / "doctrees"),
        str(DOCS),
        str(root / "html"),
    ]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert sorted(DOCS.rglob("*")) == before, "the build wrote into docs/"
    return root / "html"


@pytest.fixture(scope="module")
def reference(site: Path) -> str:
    """What is to be read on the reference page, with one space between words."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", (site / "reference.html").read_text())).split())


def test_every_page_is_built_and_linked_from_the_first(site: Path) -> None:
    first = (site / "index.html").read_text()
    names = {path.stem for path in DOCS.glob("*.md")}
    assert len(names) > 10
    assert {name for name in names if not (site / f"{name}.html").is_file()} == set()
    assert {name for name in names - {"index"} if f'href="{name}.html"' not in first} == set()


@pytest.mark.parametrize(("stage", "method"), [(stage, method) for stage, methods in METHODS.items() for method in methods])
def test_the_reference_has_every_setting_of_every_method(stage: str, method: str, reference: str) -> None:
    section = reference.partition(f" {stage} {method}¶ ")[2].partition("¶")[0]
    assert METHODS[stage][method].summary in section
    for name, info in method_class(stage, method).model_fields.items():
        assert f" --{name.replace('_', '-')} " in section
        assert " ".join((info.description or "").split()) in section
    for name in options_class(stage, method).model_fields:
        assert f" --{name.replace('_', '-')} " in reference


def test_the_reference_has_every_command_with_its_flags(reference: str) -> None:
    for command, flags in {
        "run": ("--list", "--set", "--from", "--only", "--dry-run", "--junit", "--summary", "--overwrite --no-overwrite"),
        "plan": ("--probe --no-probe", "--json"),
        "evaluate": ("--against", "--gate", "--tasks-folder", "--quiet"),
        "expand": ("--base", "--max-shard-size", "--threads"),
        "pack": ("--threads", "--overwrite --no-overwrite"),
        "search": ("--bits", "--bytes", "--max-loss", "--explain"),
        "merge similarity": ("--base",),
    }.items():
        section = reference.partition(f" Command: {command}¶ ")[2].partition("¶")[0]
        assert [flag for flag in flags if f" {flag} " not in section] == []
    for command in ("inspect", "report", "methods", "schema"):
        assert f" Command: {command}¶ " in reference


def test_the_reference_has_every_function_and_every_error_with_its_exit_code(reference: str) -> None:
    for name in ("prune", "quantize", "compensate", "recover", "evaluate", "export", "pack", "expand", "run"):
        assert f" compresskit.api.{name}(" in reference
    for found in vars(errors).values():
        if isinstance(found, type) and issubclass(found, errors.CompresskitError):
            section = reference.partition(f" compresskit.errors.{found.__name__}¶ ")[2].partition("¶")[0]
            assert f"Exit code {found.exit_code}." in section
