"""report/doctor.py: versions are those installed, each fault is a problem with its remedy. Oracle: the installed metadata."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import pytest
import torch

from compresskit.report import doctor as module
from compresskit.report.doctor import doctor, listing


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_sound_installation_has_no_problem(cache: Path) -> None:
    found = doctor()
    assert found["problems"] == []
    assert found["python"] == platform.python_version()
    for name in ("torch", "transformers", "compressed-tensors", "bitsandbytes", "peft"):
        assert found["packages"][name] == importlib.metadata.version(name)
    assert found["devices"][0]["device"] == "cpu"
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert set(found["formats"].values()) == {"ok"}
    assert found["cache"]["folder"] == str(cache)
    text = listing(found)
    assert f"torch{' ' * 27}" in text or importlib.metadata.version("torch") in text
    assert "PROBLEM" not in text


def test_an_old_and_a_missing_package_are_problems_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "typer":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.5.9+cu118" if name == "torch" else real(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    found = doctor()
    old, missing = sorted(found["problems"])
    assert old.startswith("torch: 2.5.9+cu118, needed is 2.6; pip install -U 'torch>=2.6'")
    assert missing.startswith("typer: not installed, needed is ")
    assert listing(found).count("PROBLEM") == 2


def test_a_torch_that_does_not_run_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> torch.Tensor:
        raise RuntimeError("Illegal instruction\nat somewhere")

    monkeypatch.setattr("torch.ones", broken)
    found = doctor()
    assert found["problems"] == [
        "torch: does not run here (Illegal instruction); install the build for this machine, see pytorch.org"
    ]


def test_a_format_that_fails_says_why_and_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise ImportError("no such library")

    monkeypatch.setitem(module.FORMATS, "gguf", fails)
    found = doctor()
    assert found["formats"]["gguf"] == "no such library"
    assert found["problems"] == []


def test_a_cache_that_cannot_be_written_is_a_problem(cache: Path) -> None:
    cache.write_text("a file")
    (problem,) = doctor()["problems"]
    assert problem.startswith(f"{cache / 'structures'}: cannot be made")
    assert "set COMPRESSKIT_CACHE" in problem


@pytest.mark.parametrize("offline", [True, False])
def test_it_says_whether_the_hub_is_asked(offline: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = doctor()
    assert found["hub"]["offline"] is offline
    assert found["hub"]["token"] is True
    assert "hf_secret" not in str(found) + listing(found)
