"""What others install and run: sdist and wheel, the GitHub Action, the image's recipe. Oracles: the formats' own readers."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import pytest
import yaml

import compresskit
from compresskit.methods import METHODS
from compresskit.recipe import shipped

ROOT = Path(__file__).parents[1]
ACTION = ROOT / ".github" / "actions" / "compresskit" / "action.yml"
DOCKERFILE = ROOT / "docs" / "docker" / "Dockerfile"
PACKAGED = ("pyproject.toml", "README.md", "LICENSE", "compresskit", "recipes")
BACKEND = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
INSTRUCTIONS = {"FROM", "ARG", "RUN", "COPY", "ENV", "USER", "VOLUME", "WORKDIR", "ENTRYPOINT", "CMD"}


def built(what: str, source: Path, folder: Path) -> Path:
    """The sdist or the wheel of a source tree, by the project's build backend as it is installed here."""
    command = [sys.executable, "-W", "ignore", "-c", BACKEND, f"build_{what}", str(folder)]
    finished = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return folder / finished.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(the sdist, the wheel that is built from it, as an installer does)."""
    root = tmp_path_factory.mktemp("build")
    for name in ("source", "dist", "unpacked"):
        (root / name).mkdir()
    for name in PACKAGED:
        copy: Any = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / "source" / name)
    sdist = built("sdist", root / "source", root / "dist")
    with tarfile.open(sdist) as archive:
        archive.extractall(root / "unpacked", filter="data")
    (unpacked,) = (root / "unpacked").iterdir()
    return sdist, built("wheel", unpacked, root / "dist")


@pytest.mark.slow
def test_the_wheel_holds_the_whole_package_and_says_who_it_is(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        names = set(wheel.namelist())
        (information,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(wheel.read(information))
        scripts = wheel.read(information.replace("METADATA", "entry_points.txt")).decode()
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "compresskit").rglob("*.py")}
    assert sources - names == set()
    assert {f"compresskit/recipes/{name}.yaml" for name in shipped.names()} - names == set()
    assert (metadata["Name"], metadata["Version"]) == ("compresskit", compresskit.__version__)
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "compresskit = compresskit.cli.main:main" in scripts, "pipx and uvx run the program of the package's name"


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv-tools").is_dir(), reason="no tools of .ci/release, which checks this too")
def test_the_index_would_take_them(distributions: tuple[Path, Path]) -> None:
    command = [ROOT / ".ci" / "tools", "twine", "check", "--strict", *distributions]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("PASSED") == 2


@pytest.mark.slow
def test_the_wheel_runs_in_an_environment_of_its_own(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """Its dependencies are those installed here: a path file adds them, and leaves this checkout out."""
    room = tmp_path / "room"
    venv.create(room, with_pip=False)
    place = Path(sysconfig.get_path("purelib", vars={"base": str(room), "platbase": str(room)}))
    (place / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = room / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", distributions[1]]
    subprocess.run(install, env=environment, check=True, capture_output=True)

    def said(*command: object) -> str:
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    assert Path(said(python, "-c", "import compresskit; print(compresskit.__file__)").strip()).is_relative_to(place)
    listed = json.loads(said(room / "bin" / "compresskit", "methods", "--json"))
    assert {stage: list(found) for stage, found in listed.items()} == {stage: list(found) for stage, found in METHODS.items()}
    assert said(room / "bin" / "compresskit", "--version") == f"{compresskit.__version__}\n"
    assert set(json.loads(said(room / "bin" / "compresskit", "run", "--list", "--json"))) == set(shipped.names())


def test_the_action_runs_a_recipe_and_no_input_is_read_as_code() -> None:
    action = yaml.safe_load(ACTION.read_text())
    inputs, steps = action["inputs"], action["runs"]["steps"]
    assert action["runs"]["using"] == "composite"
    assert inputs["recipe"]["default"] in shipped.names()
    used = set(re.findall(r"inputs\.([\w-]+)", ACTION.read_text()))
    assert used == set(inputs)
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"], "an input is passed through the environment, which a shell does not run"
            checked = subprocess.run(["bash", "-n"], input=step["run"], capture_output=True, text=True, check=False)
            assert (checked.returncode, checked.stderr) == (0, "")


def test_the_action_passes_its_inputs_on(tmp_path: Path) -> None:
    (step,) = (step for step in yaml.safe_load(ACTION.read_text())["runs"]["steps"] if step.get("name") == "Run")
    program = tmp_path / "compresskit"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    given = {"RECIPE": "ci-gate", "SOURCE": "my model; $(touch x)", "OUT": "out", "SETTINGS": "bits=3\ntext=a b.txt"}
    environment = {**os.environ, **given, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    wanted = [
        "run",
        "ci-gate",
        "out",
        "--junit",
        "junit.xml",
        "--source=my model; $(touch x)",
        "--set=bits=3",
        "--set=text=a b.txt",
    ]
    assert finished.stdout.splitlines() == wanted
    assert not (tmp_path / "x").exists()


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile: comments left out, continued lines joined."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    whole = [line.strip() for line in lines.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in whole)]


def test_the_image_s_recipe_is_well_formed_and_copies_what_the_package_needs() -> None:
    found = instructions(DOCKERFILE.read_text())
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert all(rest for _, rest in found)
    assert found[0][0] == "FROM"
    copied = {name for word, rest in found if word == "COPY" for name in rest.split()[:-1]}
    assert copied == set(PACKAGED)
    assert all((ROOT / name).exists() for name in copied)
    arguments = {rest.partition("=")[0]: rest.partition("=")[2] for word, rest in found if word == "ARG"}
    after = "\n".join(rest for word, rest in found if word != "ARG")
    assert set(re.findall(r"\$\{(\w+)\}", after)) == set(arguments)
    declared = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2]
    assert all(re.search(rf"^{extra} = ", declared, re.M) for extra in arguments["EXTRAS"].split(","))
    last = dict(found)
    assert json.loads(last["ENTRYPOINT"]) == ["compresskit"]
    assert json.loads(last["CMD"]) == ["--help"]
    assert last["USER"] != "root"
    for word, rest in found:
        if word == "RUN":
            assert subprocess.run(["bash", "-n"], input=rest, text=True, check=False).returncode == 0
