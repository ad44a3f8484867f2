"""What is installed, audited and released: locked by hash, under known licences. Oracles: packaging, the installed metadata."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
LOCKS = [CI / "requirements.lock", CI / "tools.lock"]


def program(name: str) -> ModuleType:
    """A Python program of .ci as a module."""
    loader = SourceFileLoader(name, str(CI / name))
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def licences() -> ModuleType:
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        return program("licences")
    finally:
        sys.dont_write_bytecode = before


def pins(lock: Path) -> dict[str, list[Requirement]]:
    found: dict[str, list[Requirement]] = {}
    for line in re.findall(r"^([\w.-]+==.+?) \\$", lock.read_text(), re.M):
        found.setdefault(Requirement(line).name, []).append(Requirement(line))
    return found


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.name)
def test_a_lock_file_pins_by_hash_says_how_it_is_made_and_names_no_machine(lock: Path) -> None:
    text = lock.read_text()
    assert text.splitlines()[1].strip() == "#    .ci/lock"
    assert (CI / "lock").stat().st_mode & 0o111
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert {re.sub(r"==.*|sha256:.*", "", line) for line in lines if line.startswith("--")} == {"--hash="}
    parts = re.split(r"(?m)^(?=[\w.-]+==)", text)[1:]
    assert all("--hash=sha256:" in part for part in parts)
    assert not re.search(r"file:|://|/home|/root|/opt|/tmp|/work", text)


def test_the_lock_file_satisfies_every_requirement_of_the_package() -> None:
    locked = pins(LOCKS[0])
    declared = [Requirement(text) for text in importlib.metadata.requires("compresskit") or []]
    for each in declared:
        if each.name == "compresskit":
            continue
        versions = [next(iter(pin.specifier)).version for pin in locked.get(canonicalize_name(each.name), [])]
        assert versions, f"{each.name} is not locked; run .ci/lock"
        assert all(each.specifier.contains(version, prereleases=True) for version in versions), f"{each}; run .ci/lock"


def test_the_page_of_licences_is_current_and_all_are_allowed(licences: ModuleType) -> None:
    listed: dict[str, str] = licences.listed()
    assert listed.keys() == licences.pinned().keys(), "run .ci/licences"
    assert {name for name, found in listed.items() if not licences.allowed(name, found)} == set()


def test_what_is_installed_states_the_licence_that_the_page_lists(licences: ModuleType) -> None:
    listed: dict[str, str] = licences.listed()
    pinned: dict[str, str] = licences.pinned()
    compared = {}
    for each in importlib.metadata.distributions():
        name = licences.normal(each.name)
        if name in pinned and each.version.partition("+")[0] == pinned[name] and each.version.count("+") == 0:
            meta = each.metadata
            stated = (meta["License-Expression"], meta.get_all("Classifier") or [], meta["License"])
            compared[name] = licences.licence(name, *stated)
    assert {name: found for name, found in compared.items() if found != listed[name]} == {}


@pytest.mark.parametrize(
    ("name", "expression", "allowed"),
    [
        ("a", "MIT", True), ("a", "MIT AND Zlib", True), ("a", "GPL-3.0-only OR MIT", True), ("a", "MIT AND GPL-3.0-only", False),
        ("a", "AGPL-3.0-only", False), ("a", "not stated", False), ("a", "LicenseRef-NVIDIA-Proprietary", False),
        ("nvidia-x", "LicenseRef-NVIDIA-Proprietary", True), ("a", "(MIT AND Zlib)", True), ("chardet", "GPL-3.0-only", False),
    ],
)  # fmt: skip
def test_a_licence_that_is_not_on_the_list_is_refused(name: str, expression: str, allowed: bool, licences: ModuleType) -> None:
    assert licences.allowed(name, expression) is allowed


FOUND = {"name": "jinja2", "version": "2.4.1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1"]}]}
CLEAN = {"name": "torch", "version": "2.13.0", "vulns": []}
UNKNOWN = {"name": "torch", "skip_reason": "not found"}


def audited(scratch: Path, answers: dict[str, Any], *flags: str) -> subprocess.CompletedProcess[str]:
    """Run .ci/audit with a pip-audit that gives these answers by the end of the file's name; None: no answer at all."""
    (scratch / "answers.json").write_text(json.dumps(answers))
    (scratch / "pip_audit.py").write_text(f"""
import json, sys
name = sys.argv[sys.argv.index("--requirement") + 1]
answers = json.load(open({str(scratch / "answers.json")!r}))
found = next(value for end, value in answers.items() if name.endswith(end))
if found is None:
    sys.exit("Traceback: lines\\nConnectionError: no network")
print(json.dumps({{"dependencies": found}}))
""")
    environment = {**os.environ, "PIP_AUDIT": f"{sys.executable} {scratch / 'pip_audit.py'}"}
    command = [sys.executable, CI / "audit", *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("answer", [None, [], [{**UNKNOWN, "name": "jinja2"}]], ids=["no network", "nothing", "a mirror"])
@pytest.mark.parametrize(("flags", "code"), [((), 0), (("--required",), 75)])
def test_an_audit_that_can_ask_nobody_says_so_and_is_no_failure(
    answer: Any, flags: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    finished = audited(tmp_path, {"": answer}, *flags)
    assert finished.returncode == code
    assert finished.stderr.startswith("audit: SKIPPED, no database of vulnerabilities can be asked (pypi: ")
    assert finished.stderr.count("\n") == 1


def test_an_audit_lists_what_is_vulnerable_and_fails(tmp_path: Path) -> None:
    vulnerable = CLEAN | {"vulns": [{"id": "CVE-1", "fix_versions": ["2.14"]}]}
    finished = audited(tmp_path, {"known.txt": [FOUND], "requirements.lock": [vulnerable], "tools.lock": []})
    assert (finished.returncode, finished.stdout) == (1, "requirements.lock: torch 2.13.0: CVE-1; mended in 2.14\n")
    assert "FOUND" in finished.stderr


def test_an_audit_without_a_finding_passes_and_names_what_it_could_not_ask_about(tmp_path: Path) -> None:
    finished = audited(tmp_path, {"known.txt": [FOUND], "requirements.lock": [CLEAN, UNKNOWN], "tools.lock": []})
    assert (finished.returncode, finished.stdout) == (0, "requirements.lock: pypi does not know torch\n")
    assert finished.stderr == "audit: no known vulnerabilities, asked pypi\n"


def test_an_audit_that_breaks_half_way_is_a_failure(tmp_path: Path) -> None:
    finished = audited(tmp_path, {"known.txt": [FOUND], "requirements.lock": None})
    assert (finished.returncode, finished.stderr) == (1, "audit: FAILED on requirements.lock: ConnectionError: no network\n")


def test_a_release_does_not_mix_with_older_files(tmp_path: Path) -> None:
    (tmp_path / "old.whl").write_text("")
    finished = subprocess.run([CI / "release", tmp_path], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stderr) == (2, f"{tmp_path}: is not empty; move what is in it away\n")
