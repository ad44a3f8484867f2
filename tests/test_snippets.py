"""Every snippet of the README and the documentation runs as it stands, page by page, on tiny models. End to end.

Names in the snippets keep their meaning, with something small behind it: the cache holds a tiny llama where the demo model
would lie, `meta-llama/Llama-3.2-1B` is a folder, and so are the texts and adapters that a page takes for granted
(`GIVEN`). What else differs is written in snippet_shell.py: time-saving values for settings that a snippet leaves out.
Blocks of a page run one after the other in one folder, in document order, each as a script of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import image_models
import pytest
from snippet_shell import ADDRESS
from tiny_models import make_adapter, make_model

from compresskit.checkpoint.demo import NAME, RECORD, WHEEL_SHA256
from compresskit.checkpoint.reader import sha256

ROOT = Path(__file__).parents[1]
SHELL = Path(__file__).with_name("snippet_shell.py")
FENCE = re.compile(r"^```([\w{}-]*)(?: [^\n]*)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SIZES = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 4096,
}  # fmt: skip
"""Widths that groups of 64 divide, and a context for windows of 1,024 tokens."""
SHELLS = ("console", "sh")
SHOWN = {
    "yaml": "test_recipe_docs.py", "py": "test_contributing.py", "text": "output", "": "the README's map",
    "{toctree}": "made into links by the site", "{literalinclude}": "files of docs/, which test_recipe_docs.py checks",
}  # fmt: skip
"""Languages of blocks that no shell can run, with who checks them."""
GIVEN: dict[str, str] = {
    "compeft.md": (
        "cp -r expert-1 my-adapter; for n in 1 2 3; do cp -r expert-$n $(echo $n | tr 123 abc); done; "
        "for x in a b c; do compresskit quantize compeft $x $x.c; done; cp -r meta-llama/Llama-3.2-1B base-model"
    ),
    "recover.md": "compresskit prune cfsp demo:smollm2-135m pruned; compresskit quantize rtn demo:smollm2-135m low",
    "how-to.md": "mkdir adapters; cp -r expert-1 adapters/poems; cp -r expert-2 adapters/letters",
}
"""What the snippets of a page take for granted besides texts and models, as the shell makes it."""
INSTALLS = ("python3 -m venv", ".venv/bin/pip install")
"""Commands that are left out: the tests run where everything is installed, and without a network."""
NOT_RUN = {
    ("README.md", 2): "it runs all tests, this one too; that .ci/run takes it as it stands is tested below",
    ("tutorial.md", 7): "the README's first block runs the same recipe",
    ("scale.md", 1): "test_distributed.py runs such commands, and each rank imports everything anew",
}
"""Page and number of the block, with the reason."""


class Block(NamedTuple):
    """A fenced block: its language, its content."""

    language: str
    content: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in FENCE.findall(page.read_text(encoding="utf-8"))]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if any(block.language in (*SHELLS, "python") for block in blocks(page))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama, a cache that has it for the demo model, a tuned one, one with experts, one that sees, adapters."""
    root = tmp_path_factory.mktemp("models")
    llama = make_model(root / "cache" / "demo" / NAME, "llama", **SIZES)
    files = {path.name: sha256(path) for path in llama.iterdir()}
    (llama / RECORD).write_text(json.dumps({"wheel_sha256": WHEEL_SHA256, "files": files}))
    make_model(root / "tuned-model", "llama", seed=1, **SIZES)
    make_model(root / "Qwen" / "Qwen3-30B-A3B", "qwen3_moe", max_position_embeddings=2048)
    image_models.gemma3(root / "vision-model")
    for seed in range(1, 4):
        make_adapter(root / f"expert-{seed}", llama, seed)
    return root


@pytest.fixture(scope="module")
def environment(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of the snippets, with the server behind `compresskit` at work."""
    programs = tmp_path_factory.mktemp("programs")
    for name, line in {"compresskit": f"{SHELL} call", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {line} "$@"\n')
        (programs / name).chmod(0o755)
    with tempfile.TemporaryDirectory() as short:  # the path of a socket is limited to 107 bytes
        address = str(Path(short) / "server")
        home = tmp_path_factory.mktemp("home")
        found = {
            **os.environ, "PATH": f"{programs}:{os.defpath}", "HOME": str(home), "HF_HUB_OFFLINE": "1", ADDRESS: address,
            "COMPRESSKIT_CACHE": str(models / "cache"), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE",
        }  # fmt: skip
        found.pop("GITHUB_STEP_SUMMARY", None)
        command = [sys.executable, str(SHELL), "serve", address]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=found, start_new_session=True
        ) as server:
            assert server.stdin is not None and server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            yield found
            server.stdin.close()  # which ends it


@pytest.fixture
def folder(models: Path, text_file: Path, tmp_path: Path) -> Path:
    """A folder with the models and texts that the snippets name."""
    shutil.copytree(models / "cache" / "demo" / NAME, tmp_path / "meta-llama" / "Llama-3.2-1B")
    for path in models.iterdir():
        if path.name != "cache":
            shutil.copytree(path, tmp_path / path.name)
    text = text_file.read_text()
    (tmp_path / "heldout.txt").write_text(text[: len(text) // 2])
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text[i : i + 500]}) + "\n" for i in range(0, 20000, 500)))
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n + 1)))} for n in range(2, 42)]
    (tmp_path / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    image_models.json_file(tmp_path, image_models.rows(texts=200)).rename(tmp_path / "pictures.jsonl")
    return tmp_path


def shell(script: str, folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # The colon keeps bash from becoming its last command: --install-completion looks for a shell among its parents.
    command = ["/bin/bash", "-eo", "pipefail", "-c", f"{script.rstrip()}\n:"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=600)


def without_installs(script: str) -> str:
    """The script without the commands of `INSTALLS`."""
    commands = script.split(" && ")
    return " && ".join(command for command in commands if not command.startswith(INSTALLS))


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_the_snippets_of_a_page_run(page: Path, folder: Path, environment: dict[str, str]) -> None:
    given = shell(GIVEN.get(page.name, ""), folder, environment)
    assert given.returncode == 0, given.stderr
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "compresskit").symlink_to(shutil.which("compresskit", path=environment["PATH"]) or "")
    for number, block in enumerate(blocks(page), start=1):
        if block.language == "yaml" and "\nsteps:" in block.content:
            (folder / "recipe.yaml").write_text(block.content)
        if (page.name, number) in NOT_RUN or block.language in SHOWN:
            continue
        if block.language == "python":
            (folder / "snippet.py").write_text(block.content)
        script = "python snippet.py" if block.language == "python" else without_installs(block.content)
        finished = shell(script, folder, environment)
        assert finished.returncode == 0, f"{page.name}, block {number}: {script}\n{finished.stderr[-3000:]}"


@pytest.mark.slow
def test_a_snippet_with_a_mistake_fails(folder: Path, environment: dict[str, str]) -> None:
    for script, said in {
        "compresskit prune cfsp demo:smollm2-135m out --sparsty 0.3": "--sparsity",
        "compresskit evaluate nowhere | cat": "no such folder",
        "compresskit prun cfsp demo:smollm2-135m out": "prun",
    }.items():
        finished = shell(script, folder, environment)
        assert finished.returncode == 2
        assert said in finished.stderr


def test_every_block_is_run_or_checked_elsewhere() -> None:
    assert {block.language for page in PAGES for block in blocks(page)} <= {*SHELLS, "python", *SHOWN}
    assert all(page.read_text().count("```") == 2 * len(blocks(page)) for page in PAGES)
    assert len(RUN) > 4


def test_the_test_script_runs_the_readmes_test_command(tmp_path: Path) -> None:
    stub, said = tmp_path / "bash", tmp_path / "said"
    stub.write_text(f'#!/bin/sh\nfor last; do :; done\nprintf "%s" "$last" > {said}\n')
    stub.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.defpath}"
    subprocess.run(["/bin/bash", ROOT / ".ci" / "run"], env={"PATH": path}, capture_output=True, check=True)
    assert said.read_text() == [block.content.strip() for block in blocks(ROOT / "README.md") if block.language == "sh"][1]
