"""The habits of this code base: format, lint, types, import rules, and module names in one place only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "compresskit"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
STAGE_FOLDERS = ("pruning", "quantization", "compensation", "recovery", "exporting")
WHOLE_REPOSITORY = (
    "test_habits",
    "test_docs",
    "test_snippets",
    "test_recipe_docs",
    "test_demo_model",
    "test_contributing",
    "test_families",
    "test_supply_chain",
    "test_packaging",
    "test_faults",
    "test_client_bench",
)
"""Test files whose subject is no file of the package."""
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


def test_the_readme_s_map_names_every_folder_of_the_package() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {name for name in folders if f"{name}/" not in readme} == set()


def test_the_package_s_root_holds_few_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_no_module_imports_itself_in_a_circle_not_even_later_or_for_types() -> None:
    graph = {name: imports_of(name, path) for name, path in MODULES.items()}
    while leaves := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert graph == {}, "each of these imports another of them"


def imports_of(name: str, path: Path) -> set[str]:
    """The modules of the package that a module imports anywhere, those for the type checker included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compresskit"):
            full = {f"{node.module}.{each.name}" for each in node.names}
            found |= {each if each in MODULES else str(node.module) for each in full}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names if each.name.startswith("compresskit.")}
    return found - {name}


def test_no_function_takes_more_than_seven_parameters_but_for_commands_and_kernels() -> None:
    """Triton before 3.3 takes no tuples."""
    guilty = [
        f"{name}.{node.name}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and name not in {"compresskit.cli.recipes", "compresskit.quantization.panel_kernel"}
        if len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]) > 7
    ]
    assert guilty == []


@pytest.mark.parametrize("stage", STAGE_FOLDERS)
def test_a_stage_s_folder_has_the_same_file_names(stage: str) -> None:
    assert {f"{name}.py" for name in ("method", "request", "run")} <= {path.name for path in (PACKAGE / stage).glob("*.py")}


def test_the_command_line_the_recipes_and_all_requests_and_methods_load_without_torch() -> None:
    """A wrong request is refused in under a second; importing torch alone takes longer."""
    classes = [name for entries in METHODS.values() for name in {entry.target.partition(":")[0] for entry in entries.values()}]
    modules = [f"compresskit.{name}" for name in classes]
    modules += [f"compresskit.{stage}.{name}" for stage in STAGE_FOLDERS for name in ("request", "method", "run")]
    modules += [name for name in MODULES if name.startswith(("compresskit.cli.", "compresskit.recipe.", "compresskit.report."))]
    program = f"import sys, {', '.join(['compresskit.job', *modules])}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("**/test_*.py")), ids=lambda path: path.stem)
def test_a_test_file_names_its_source(path: Path) -> None:
    if path.stem in WHOLE_REPOSITORY:
        return
    folder = path.relative_to(ROOT / "tests").parent
    named = re.match(r"((?:[\w/]+\.py(?:, | and )?)+):", ast.get_docstring(ast.parse(path.read_text())) or "")
    assert named, "its docstring begins with the path of its source"
    sources = re.findall(r"[\w/]+\.py", named[1])
    assert all((PACKAGE / source).is_file() for source in sources), sources
    assert any(Path(source).parent == folder for source in sources), f"its source lies in another folder than {folder}"


def test_every_package_is_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text().partition("packages = [")[2].partition("]")[0]
    listed = set(re.findall(r'"([\w.]+)"', text)) - {"compresskit.recipes"}
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "compresskit").rglob("__init__.py")}
    assert listed == found
