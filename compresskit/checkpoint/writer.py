"""Write a checkpoint folder tensor by tensor, in any order, with bounded memory, resumably.

All output goes to the result folder inside `OUT.partial/` (folder.py). The shapes of all tensors are known before the first
one is written, so the safetensors headers are final from the start and each tensor goes straight to its offset. `commit`
syncs the files and gives the folder its name. A killed run can be resumed: `progress.json` lists the complete blocks, and
their tensors can be read back.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import distributed
from compresskit.checkpoint import digests, folder
from compresskit.checkpoint.outputs import Outputs, Shard
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.side_files import SIDE_FILES, copy_side_files
from compresskit.checkpoint.weight_files import INDEX
from compresskit.checkpoint.whole_files import storing, sync, write_whole, write_whole_json
from compresskit.checkpoint.work_folder import MANIFEST, WorkFolder
from compresskit.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from torch import Tensor


class Writer:
    """Writer of a checkpoint folder; call `start` or `resume` first. Without `commit` nothing appears.

    `fingerprint()` identifies the request; unfinished output is only resumed by the same request. A file is hashed in a thread
    as soon as it is whole. Of several ranks the first writes; the others keep account, and wait where they may read afterwards
    what was written.
    """

    def __init__(self, work: WorkFolder, outputs: Outputs, max_shard_bytes: int, fingerprint: Callable[[], str]):
        self.work = work
        self.outputs = outputs
        self.partial = work.result
        self.model_shards = outputs.model_shards(max_shard_bytes)
        self.shards = self.model_shards + outputs.extra_shards
        self.specs = {spec.name: spec for spec in outputs.specs}
        self.shard_of = {name: shard for shard in self.shards for name in shard.offsets}
        self.missing = set(self.specs)
        self.done: list[int] = []
        """Blocks on disk."""
        self.fingerprint = fingerprint
        self.digests: digests.Digests = {}
        self.facts: dict[str, Any] = {}

    def start(self, source: Path) -> None:
        """Create the result folder: empty shards, configuration, generated files, and the source's side files."""
        if distributed.is_first():
            folder.start_result(self.work)
            for shard in self.shards:
                path = self.partial / shard.name
                with storing(path):
                    path.parent.mkdir(exist_ok=True)
                    with path.open("wb") as file:
                        file.write(shard.header)
                        file.truncate(shard.size)
            self._write_small_files(source)
        distributed.wait()

    def resume(self, source: Path, progress: dict[str, Any]) -> None:
        """Continue an interrupted run of the same request (see `read_progress`), with new small files and no manifest.

        Raises:
            RequestError: what the interrupted run had written is damaged.
        """
        for shard in self.shards:
            path = self.partial / shard.name
            if not path.is_file() or path.stat().st_size != shard.size:
                raise RequestError(f"{path}: is not as it was left; start again, without --resume")
        self.done = list(progress["blocks"])
        self.missing -= set(progress["written"])
        self.facts = progress["facts"]
        if distributed.is_first():
            with storing(self.partial):
                (self.partial / MANIFEST).unlink(missing_ok=True)
            self._write_small_files(source)
        distributed.wait()

    def _write_small_files(self, source: Path) -> None:
        """Write what is no weight. Without a configuration (adapter folders) the source's side files are not copied."""
        if self.outputs.config is not None:
            self.write_text("config.json", json.dumps(self.outputs.config, indent=2) + "\n")
            copy_side_files(source, self.partial, tuple(name for name in SIDE_FILES if name not in self.outputs.left_out))
        for name, text in self.outputs.files.items():
            self.write_text(name, text)
        if len(self.model_shards) > 1:
            weight_map = dict(sorted((name, shard.name) for shard in self.model_shards for name in shard.offsets))
            specs = [self.specs[name] for name in weight_map]
            totals = {"total_size": sum(s.bytes for s in specs), "total_parameters": sum(s.elements for s in specs)}
            self.write_text(INDEX, json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2) + "\n")
        sync(self.partial)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, already in its stored dtype and shape.

        Raises:
            CheckpointError: the shape or size differs from the plan.
            StorageError: the file cannot be written, for example on a full disk.
        """
        import torch  # this module is imported before torch is wanted

        spec = self.specs[name]
        if tuple(tensor.shape) != spec.shape:
            raise CheckpointError(f"{name}: shape {list(tensor.shape)} was announced as {list(spec.shape)}")
        self.missing.discard(name)
        if not distributed.is_first():
            return
        # A one-element tensor counts as contiguous with any stride, but then cannot be viewed as bytes.
        data = tensor.detach().cpu().contiguous().as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy()
        if data.nbytes != spec.bytes:
            raise CheckpointError(f"{name}: {data.nbytes} bytes were announced as {spec.bytes} of {spec.dtype}")
        shard = self.shard_of[name]
        path = self.partial / shard.name
        digests.forget(self.digests, path)
        with storing(path), path.open("r+b") as file:
            file.seek(shard.offsets[name])
            file.write(data.data)

    def copy(self, names: list[str], source: Checkpoint) -> None:
        """Copy tensors from the source bit for bit, or converted if another dtype was planned."""
        from compresskit.machine.precision import torch_dtype

        for name in names:
            if not distributed.is_first():
                self.missing.discard(name)
                continue
            tensor = source.read(name)
            wanted = self.specs[name].dtype
            self.put(name, tensor if source.spec(name).dtype == wanted else tensor.to(torch_dtype(wanted)))

    def copy_missing(self, source: Checkpoint, prefix: str = "") -> None:
        """Copy all unwritten tensors with this name prefix from the source."""
        self.copy([name for name in self.specs if name in self.missing and name.startswith(prefix)], source)
        self._hash_whole_files()

    def finish_block(self, index: int, facts: dict[str, Any]) -> None:
        """Record that this block is on disk, with the method's facts about it."""
        self.facts.setdefault("blocks", []).append(facts)
        self.done.append(index)
        if distributed.is_first():
            written = sorted(set(self.specs) - self.missing)
            progress = {"fingerprint": self.fingerprint(), "blocks": self.done, "written": written, "facts": self.facts}
            for shard in self.shards:
                sync(self.partial / shard.name)
            write_whole_json(self.work.progress, progress)
        self._hash_whole_files()

    @property
    def written(self) -> tuple[int, int]:
        """Return (elements of all tensors, bytes of all weight files)."""
        return sum(spec.elements for spec in self.specs.values()), sum(shard.size for shard in self.shards)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of the weight files."""
        self._hash(self.shards)
        return {shard.name: self.digests[self.partial / shard.name].result() for shard in self.shards}

    def _hash_whole_files(self) -> None:
        """Begin to hash the files of which every tensor is written."""
        unfinished = {self.shard_of[name].name for name in self.missing}
        self._hash([shard for shard in self.shards if shard.name not in unfinished])

    def _hash(self, shards: list[Shard]) -> None:
        for shard in shards if distributed.is_first() else ():
            digests.begin(self.digests, [self.partial / shard.name])

    def commit(self, manifest: dict[str, Any]) -> None:
        """Write the manifest and give the folder its final name, replacing an older one if that was asked for.

        Raises:
            CheckpointError: a planned tensor was never written.
            StorageError: the disk fails, or a folder of this name appeared meanwhile.
        """
        if self.missing:
            raise CheckpointError(f"{self.partial}: {len(self.missing)} tensors were never written, first {min(self.missing)}")
        if distributed.is_first():
            self.write_text(MANIFEST, json.dumps(manifest | {"request": self.fingerprint()}, indent=1) + "\n")
            folder.commit(self.work)
        distributed.wait()

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file into the folder, whole or not at all; raises StorageError if the disk fails."""
        if not distributed.is_first():
            return
        path = self.partial / name
        with storing(path):
            path.parent.mkdir(exist_ok=True)
        write_whole(path, text)
