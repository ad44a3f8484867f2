"""Write a checkpoint folder atomically, tensor by tensor, in any order, with bounded memory.

All output goes to `OUT.partial/`. The shapes of all tensors are known before the first one is written, so the
safetensors headers are final from the start and each tensor goes straight to its offset. `commit` syncs the files
and renames the folder. A killed run can be resumed from `OUT.partial/`: `progress.json` lists the complete steps, and
their tensors can be read back.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.folder import FILE_MODE, commit_folder, partial_folder, start_folder, sync
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import INDEX, Checkpoint, read_json, sha256
from compresskit.errors import CheckpointError, CompresskitError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

SIDE_FILES = (
    "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "LICENSE", "LICENSE.txt",
    "NOTICE", "USE_POLICY.md",
)  # fmt: skip
"""Files that stock tools read in addition to the weights; copied byte for byte."""
PROGRESS = "progress.json"
SPARE_BYTES = 1 << 24
"""Disk space reserved for the small files (16 MiB)."""


def check_out(out: Path, source: Path, needed_bytes: int, overwrite: bool) -> None:
    """Check an output folder before anything is written.

    Raises:
        RequestError: it exists (unless `overwrite`), lies inside the source or contains it, is not writable, or its disk has
            less than `needed_bytes` free.
    """
    if out.exists() and not overwrite:
        raise RequestError(f"{out}: exists already; choose another folder, or pass --overwrite")
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out}: is a file, not a folder; choose another path")
    resolved, inside = out.resolve(), source.resolve()
    if resolved == inside or inside in resolved.parents:
        raise RequestError(f"{out}: lies inside the source {source}; choose a folder beside it")
    if resolved in inside.parents:
        raise RequestError(f"{out}: contains the source {source}; choose a folder beside it")
    existing = next(parent for parent in resolved.parents if parent.exists())
    if not os.access(existing, os.W_OK):
        raise RequestError(f"{existing}: cannot be written to; choose another output folder")
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + SPARE_BYTES:
        raise RequestError(
            f"{out}: the result needs about {needed_bytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free; "
            "free some space, or choose another disk"
        )


class Writer:
    """Writer of a checkpoint folder. Use as a context manager; without `commit` nothing appears.

    `fingerprint` identifies the request; a partial folder is only resumed by the same request.
    """

    def __init__(self, out: Path, outputs: Outputs, max_shard_bytes: int, fingerprint: str):
        self.out = out
        self.outputs = outputs
        self.partial = partial_folder(out)
        self.model_shards = outputs.model_shards(max_shard_bytes)
        self.shards = self.model_shards + outputs.extra_shards
        self.specs = {spec.name: spec for spec in outputs.specs}
        self.shard_of = {name: shard for shard in self.shards for name in shard.offsets}
        self.missing = set(self.specs)
        self.done: list[int] = []
        """Blocks on disk."""
        self.fingerprint = fingerprint
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Remove the partial folder after an error that would recur; keep it after an interruption."""
        if kind is not None and issubclass(kind, CompresskitError):
            shutil.rmtree(self.partial, ignore_errors=True)

    def start(self, source: Path) -> None:
        """Create the partial folder: configuration, the source's side files, generated files, empty shards.

        Without a configuration (adapter folders) the source's side files are not copied.
        """
        start_folder(self.out)
        if self.outputs.config is not None:
            self.write_text("config.json", json.dumps(self.outputs.config, indent=2) + "\n")
            for name in SIDE_FILES:
                if (source / name).is_file():
                    shutil.copyfile(source / name, self.partial / name)
        for name, text in self.outputs.files.items():
            self.write_text(name, text)
        for shard in self.shards:
            (self.partial / shard.name).parent.mkdir(exist_ok=True)
            with (self.partial / shard.name).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.size)
            (self.partial / shard.name).chmod(FILE_MODE)
        if len(self.model_shards) > 1:
            weight_map = dict(sorted((name, shard.name) for shard in self.model_shards for name in shard.offsets))
            totals = {
                "total_size": sum(self.specs[name].bytes for name in weight_map),
                "total_parameters": sum(self.specs[name].elements for name in weight_map),
            }
            self.write_text(INDEX, json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2) + "\n")

    def resume(self, progress: dict[str, Any]) -> None:
        """Continue in the partial folder of an interrupted run of the same request (see `read_progress`)."""
        self.done = list(progress["blocks"])
        self.missing -= set(progress["written"])
        self.facts = progress["facts"]

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, already in its stored dtype and shape.

        Raises:
            CheckpointError: the shape or size differs from the plan.
            CompresskitError: the file cannot be written, for example on a full disk.
        """
        import torch  # this module is imported before torch is wanted

        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name}: shape {list(tensor.shape)} was announced as {list(spec.shape)}")
        # A one-element tensor counts as contiguous with any stride, but then cannot be viewed as bytes.
        data = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
        if data.nbytes != spec.bytes:
            raise CheckpointError(f"{name}: {data.nbytes} bytes were announced as {spec.bytes} of {spec.dtype}")
        shard = self.shard_of[name]
        try:
            with (self.partial / shard.name).open("r+b") as file:
                file.seek(shard.offsets[name])
                file.write(data.data)
        except OSError as error:
            raise CompresskitError(
                f"{self.partial / shard.name}: cannot be written ({error.strerror}); free some space"
            ) from error
        self.missing.discard(name)

    def copy(self, names: list[str], source: Checkpoint) -> None:
        """Copy tensors from the source bit for bit, or converted if another dtype was planned."""
        from compresskit.machine.precision import torch_dtype

        for name in names:
            tensor = source.read(name)
            wanted = self.specs[name].dtype
            self.put(name, tensor if source.spec(name).dtype == wanted else tensor.to(torch_dtype(wanted)))

    def copy_missing(self, source: Checkpoint, prefix: str = "") -> None:
        """Copy all unwritten tensors with this name prefix from the source."""
        self.copy([name for name in self.specs if name in self.missing and name.startswith(prefix)], source)

    def finish_block(self, index: int, facts: dict[str, Any]) -> None:
        """Record that this block is on disk, with the method's facts about it."""
        self.facts.setdefault("blocks", []).append(facts)
        self.done.append(index)
        written = sorted(set(self.specs) - self.missing)
        progress = {"fingerprint": self.fingerprint, "blocks": self.done, "written": written, "facts": self.facts}
        for shard in self.shards:
            sync(self.partial / shard.name)
        temporary = self.partial / (PROGRESS + ".new")
        temporary.write_text(json.dumps(progress), encoding="utf-8")
        sync(temporary)
        temporary.replace(self.partial / PROGRESS)

    @property
    def written(self) -> tuple[int, int]:
        """Return (elements of all tensors, bytes of all weight files)."""
        return sum(spec.elements for spec in self.specs.values()), sum(shard.size for shard in self.shards)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weight files."""
        return {shard.name: sha256(self.partial / shard.name) for shard in self.shards}

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest, sync, and rename the folder to its final name, replacing an older one.

        Raises:
            CheckpointError: a planned tensor was never written.
        """
        if self.missing:
            raise CheckpointError(f"{self.partial}: {len(self.missing)} tensors were never written, first {min(self.missing)}")
        self.write_text("compresskit.json", json.dumps(manifest, indent=1) + "\n")
        (self.partial / PROGRESS).unlink(missing_ok=True)
        commit_folder(self.out)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file into the folder."""
        (self.partial / name).parent.mkdir(exist_ok=True)
        (self.partial / name).write_text(text, encoding="utf-8")
        (self.partial / name).chmod(FILE_MODE)


def read_progress(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """Read the progress of an interrupted run of the same request.

    Returns:
        The progress for `Writer.resume`, or None if there is nothing to resume.

    Raises:
        RequestError: the partial folder belongs to another request.
    """
    path = partial_folder(out) / PROGRESS
    if not path.is_file():
        return None
    progress = read_json(path)
    if progress.get("fingerprint") != fingerprint:
        raise RequestError(f"{path.parent}: left by a run with other inputs or settings; repeat those, or drop --resume")
    return progress
