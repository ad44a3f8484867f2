"""The habits of this code base: format, lint, types, import rules, and module names in one place only."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
TOOLS = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "types": ["mypy"],
    "imports": ["lint-imports", "--no-cache"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_the_code_is_clean(tool: str) -> None:
    program, *arguments = TOOLS[tool]
    finished = subprocess.run([BIN / program, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_only_the_table_of_architectures_names_modules_of_models() -> None:
    parts = (r"\w+_proj", "fc[12]", "c_(attn|fc|proj)", "dense_h_to_4h", "self_attn", r"embed_\w+\.weight", "wte")
    named = re.compile("|".join(rf"\b{part}\b" for part in parts))
    guilty = {
        f"{path.relative_to(ROOT)}:{number}"
        for path in (ROOT / "compresskit").rglob("*.py")
        if path.name != "architectures.py"
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if named.search(line)
    }
    assert guilty == set()


def test_the_readme_names_every_file_of_the_package() -> None:
    readme = (ROOT / "README.md").read_text()
    files = {path.name for path in (ROOT / "compresskit").rglob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in files if name not in readme} == set()


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    listed = set(re.findall(r'"([\w.]+)"', text)) - {"compresskit.recipes"}
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "compresskit").rglob("__init__.py")}
    assert listed == found
