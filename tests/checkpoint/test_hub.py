"""checkpoint/hub.py: what names a model of the Hub, and every answer of a Hub on the loopback. Oracle: the Hub's own protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from compresskit.checkpoint.hub import HubModel, hub_model, origin, written_name
from compresskit.checkpoint.source import hub_name
from compresskit.errors import RequestError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REFUSED = {"org/gated": (403, "GatedRepo"), "org/none": (401, "RepoNotFound")}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a download asks for: one model, `org/name`, with one tag."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(True)

    def do_HEAD(self) -> None:
        self.answer(False)

    def answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0].removeprefix("/api/models")
        owner, name, *rest = path.strip("/").split("/")
        code, fault = REFUSED.get(f"{owner}/{name}", (200, ""))
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        body = b""
        if not fault and rest[0] == "resolve":
            body = files[rest[-1]]
        elif not fault and rest[1] not in ("main", "v1", COMMIT):
            code, fault = 404, "RevisionNotFound"
        elif not fault and rest[0] == "tree":
            body = json.dumps([{"type": "file", "path": n, "size": len(b), "oid": "0" * 40} for n, b in files.items()]).encode()
        elif not fault:
            about = {"id": "org/name", "sha": COMMIT, "private": False, "siblings": [{"rfilename": n} for n in files]}
            body = json.dumps(about).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{abs(hash(body)):x}"')
        if fault:
            self.send_header("X-Error-Code", fault)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def environment(tiny: dict[str, Path], tmp_path: Path) -> Iterator[dict[str, str]]:
    """A Hub that has the tiny llama as org/name, and an empty cache of it."""
    handler = type("Handler", (Hub,), {"folder": tiny["llama"]})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    removed = ("HF_HUB_OFFLINE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")
    kept = {key: value for key, value in os.environ.items() if key not in removed and not key.lower().endswith("_proxy")}
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield kept | {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
    server.shutdown()
    server.server_close()


def inspected(source: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compresskit", "inspect", source, "--json"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_model_is_downloaded_by_its_revision_and_then_found_offline(environment: dict[str, str]) -> None:
    finished = inspected("hf://org/name@v1", environment)
    assert finished.returncode == 0, finished.stderr
    folder = Path(json.loads(finished.stdout)["folder"])
    assert folder.name == COMMIT
    assert origin(folder) == {"model": "org/name", "commit": COMMIT}
    offline = environment | {"HF_HUB_OFFLINE": "1"}
    assert json.loads(inspected("org/name@v1", offline).stdout)["folder"] == str(folder)
    missing = inspected("org/other", offline)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "HF_HUB_OFFLINE is set and the Hub's cache lacks it; unset it" in missing.stderr


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("org/gated", "org/gated: is gated; accept its licence at http"),
        ("hf://org/none", "hf://org/none: the Hub has no such model; check the name, or, if it is private, hf auth login"),
        ("org/name@v9", "org/name@v9: org/name has no branch, tag or commit v9; check it"),
    ],
)
def test_a_refusal_is_one_line_with_its_remedy(source: str, said: str, environment: dict[str, str]) -> None:
    finished = inspected(source, environment)
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr.startswith(f"compresskit: error: {said}")
    assert finished.stderr.count("\n") == 1


def test_a_hub_that_is_not_there_is_one_line(environment: dict[str, str]) -> None:
    finished = inspected("org/name", environment | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert finished.returncode == 2
    assert "org/name: no such folder here, and the Hub cannot be reached" in finished.stderr
    assert finished.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "model"),
    [
        ("org/name", HubModel("org/name", None)),
        ("hf://org/name", HubModel("org/name", None)),
        ("org/name@v1.0", HubModel("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3", HubModel("org/name", "refs/pr/3")),
        ("./org/name", None), ("name", None), ("a/b/c", None), ("org/name@", None), ("/org/name", None), ("../a", None),
    ],
)  # fmt: skip
def test_what_names_a_model(source: str, model: HubModel | None) -> None:
    assert hub_model(source) == model
    assert hub_name(source) == ("org/name" if model and model.revision is None else None)
    assert written_name(source) == (model.name if model else None)


def test_a_folder_that_exists_is_none_but_for_the_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("org/name").mkdir(parents=True)
    assert hub_model("org/name") is None
    assert hub_model("hf://org/name") == HubModel("org/name", None)


@pytest.mark.parametrize("source", ["hf://", "hf://name", "hf:///etc/passwd", "hf://org/name@"])
def test_a_scheme_without_a_model_is_refused(source: str) -> None:
    with pytest.raises(RequestError, match="write hf://OWNER/NAME"):
        hub_model(source)


def test_no_other_folder_has_an_origin(tmp_path: Path) -> None:
    assert origin(tmp_path / COMMIT) is None
    assert origin(tmp_path / "models--org--name" / "snapshots" / "main") is None
