"""cli/push.py: refused before the work, uploaded after it. End to end, with a Hub that only takes notes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Run

FLAGS = ("--no-refit", "--round-to", "4", "--push-to-hub")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the Hub is asked to do; there is a token, and a network."""
    noted: list[dict[str, Any]] = []

    def create(self: object, repo_id: str, **given: Any) -> SimpleNamespace:
        noted.append({"repo_id": repo_id, **given})
        return SimpleNamespace(repo_id=f"me/{repo_id}" if "/" not in repo_id else repo_id)

    def upload(self: object, **given: Any) -> SimpleNamespace:
        noted.append(given | {"files": {path.name for path in Path(given["folder_path"]).iterdir()}})
        return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return noted


def test_a_result_is_uploaded_whole(run: Run, model: Path, tmp_path: Path, calls: list[dict[str, Any]]) -> None:
    code, out, err = run("prune", "magnitude", model, tmp_path / "out", *FLAGS, "org/name", "--private", "--json")
    assert code == 0, err
    assert json.loads(out)["hub"] == "https://hub/commit/1"
    made, uploaded = calls
    assert made == {"repo_id": "org/name", "private": True, "exist_ok": True}
    assert (uploaded["repo_id"], uploaded["commit_message"]) == ("org/name", "prune magnitude")
    assert uploaded["files"] == {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "compresskit.json"} <= uploaded["files"]
    assert "uploaded: https://hub/commit/1" in err
    assert "hf_secret" not in out + err


def test_where_nothing_was_written_nothing_is_uploaded(
    run: Run, model: Path, tmp_path: Path, calls: list[dict[str, Any]]
) -> None:
    flags = ("--original", model, "--calibration", "builtin", "--samples", 2, "--sequence-length", 32)
    code, out, _ = run("compensate", "svd", model, tmp_path / "out", *flags, "--push-to-hub", "org/name")
    assert (code, out) == (0, f"{model}\n")
    assert calls == []


@pytest.mark.parametrize(
    ("fault", "name", "said"),
    [
        ("offline", "org/name", "--push-to-hub org/name: HF_HUB_OFFLINE is set; unset it"),
        ("token", "org/name", "--push-to-hub org/name: there is no token of the Hub; hf auth login"),
        ("", "a/b/c", "--push-to-hub a/b/c: is no name of a repository; write OWNER/NAME"),
        ("", "--private", "--private"),
    ],
)
def test_what_cannot_be_uploaded_is_refused_before_the_work(
    fault: str, name: str, said: str, run: Run, tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", fault == "offline")
    if fault == "token":
        monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    asked = ("--private",) if name == "--private" else ("--push-to-hub", name)
    code, out, err = run("prune", "magnitude", tmp_path / "none", tmp_path / "out", *asked)
    assert (code, out, calls) == (2, "", [])
    assert err.startswith(f"compresskit: error: {said}")
    assert err.count("\n") == 1


def test_a_failed_upload_names_the_folder_and_the_way_on(
    run: Run, model: Path, tmp_path: Path, calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: object, **given: Any) -> None:
        raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fails)
    out = tmp_path / "out"
    code, printed, err = run("prune", "magnitude", model, out, *FLAGS, "org/name")
    assert (code, printed) == (1, "")
    assert err.splitlines()[-1] == (
        f"compresskit: error: --push-to-hub org/name: no route to host; {out} is whole, to try again: hf upload org/name {out}"
    )
    assert (out / "compresskit.json").is_file()
