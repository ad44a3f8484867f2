"""Task vectors: the changes made by fine-tuning, as named tensors read in sections, from three kinds of folder.

    a PEFT adapter               tau = its parameters, minus 1 where they multiply (IA3)
    a fine-tuned checkpoint      tau = its weights - the base's
    a ternary file of either     tau = scale * sign

The adapter's own parameters are the vector (ComPEFT, arXiv 2311.13171, section 2). Pairs of LoRA factors may be balanced
first (pairs.py). A section never holds more than 2**22 float32 numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.checkpoint import source
from compresskit.checkpoint.reader import BYTES_PER_ELEMENT, Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import LARGEST_CONFIG_BYTES, read_json, shown
from compresskit.errors import CheckpointError, NumericalError, RequestError, near_miss
from compresskit.formats.adapter_files import TERNARY, open_tensors
from compresskit.formats.adapter_kinds import check_read
from compresskit.formats.peft import CONFIG, WEIGHTS, Stated
from compresskit.formats.stored_forms import open_dense
from compresskit.formats.ternary.reading import Container, open_container
from compresskit.formats.ternary.sections import SECTION
from compresskit.formats.ternary.threshold import Values
from compresskit.task_vectors.pairs import balanced, experts_of, pair_of

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER_FILE = TERNARY
MODEL_FILE = "model.compeft.safetensors"
FACTORS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".ia3_l")
"""Adapter parameters in the vector; all others (DoRA's magnitudes, modules_to_save) stay dense."""
KINDS = ("LORA", "IA3")
MULTIPLIES = ".ia3_l"
"""IA3 scales activations by its parameters: 1 changes nothing."""
FLOATS = ("F32", "F16", "BF16", "F64")


def offset_of(name: str) -> float:
    """Value of a parameter that learned nothing."""
    return 1.0 if MULTIPLIES in name else 0.0


def stored_bytes(tensor: Tensor) -> bytes:
    """Bytes of a CPU tensor of any shape, as stored in files."""
    import torch

    data: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def checked_read(store: Checkpoint, name: str) -> Tensor:
    """Read a tensor; raises RequestError if it holds NaN or infinity."""
    try:
        return store.read(name)
    except NumericalError as error:
        raise RequestError(str(error)) from error


@dataclass(frozen=True)
class PlainVector:
    """The vector of an adapter, or of a checkpoint and its base."""

    store: Checkpoint
    base: Checkpoint | None
    specs: dict[str, TensorSpec]
    dense: dict[str, TensorSpec]
    balance: bool = False
    """Whether pairs of LoRA factors are read balanced."""
    pair: dict[str, Tensor] = field(default_factory=dict, compare=False)
    """The balanced pair that was read last; its two factors are stored next to each other."""
    experts: dict[str, int] = field(default_factory=dict)
    """By the name of an A, the number of experts whose factors it holds; 1 for a linear."""

    @property
    def folder(self) -> Path:
        """Folder of the vector."""
        return self.store.folder

    def tensor(self, name: str) -> Tensor:
        """A stored tensor, or its part of the balanced pair; raises RequestError if it is not finite."""
        names = pair_of(name)
        if not self.balance or names is None or not set(names) <= self.specs.keys():
            return checked_read(self.store, name)
        if name not in self.pair:
            self.pair.clear()
            first, second = (checked_read(self.store, each).float() for each in names)
            self.pair.update(zip(names, balanced(name, first, second, self.experts.get(names[0], 1)), strict=True))
        return self.pair[name]

    @property
    def is_adapter(self) -> bool:
        """Whether it belongs to a PEFT adapter."""
        return self.base is None

    def values(self, name: str) -> Iterator[Values]:
        """Values of tau in a tensor, flat float32, one section at a time; raises RequestError if not finite."""
        tuned = self.tensor(name).reshape(-1)
        base = checked_read(self.base, name).reshape(-1) if self.base else None
        offset = offset_of(name) if self.base is None else 0.0
        for start in range(0, len(tuned), SECTION):
            part = tuned[start : start + SECTION].float()
            if base is not None:
                part = part - base[start : start + SECTION].float()
            elif offset:
                part = part - offset
            values: Values = part.contiguous().numpy()
            yield values

    def dense_bytes(self, name: str) -> bytes:
        """A tensor outside the vector, as stored."""
        return stored_bytes(checked_read(self.store, name))


@dataclass(frozen=True)
class TernaryVector:
    """The vector in a ternary file."""

    folder: Path
    container: Container
    is_adapter: bool

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The tensors of the vector, in order."""
        return {name: entry.spec for name, entry in self.container.tensors.items()}

    @property
    def dense(self) -> dict[str, TensorSpec]:
        """Tensors outside the vector."""
        return self.container.dense

    def values(self, name: str) -> Iterator[Values]:
        """Values of tau in a tensor, flat float32, one section at a time."""
        entry = self.container.tensors[name]
        for part in self.container.parts(name):
            found = part.signs.astype(np.float32)
            if self.container.facts.variant == "prune":
                found[found != 0] = kept_values(entry.spec, part.values)
            else:
                found *= np.float32(entry.scale)
            yield found

    def dense_tensor(self, name: str) -> Tensor:
        """A tensor outside the vector, to write unchanged: its bits as whole numbers of the same width."""
        import torch

        spec = self.dense[name]
        numbers = np.frombuffer(bytearray(self.container.dense_bytes(name)), f"i{BYTES_PER_ELEMENT[spec.dtype]}")
        return torch.from_numpy(numbers).reshape(spec.shape)


TaskVector = PlainVector | TernaryVector
"""Both have a folder, tensors (`specs`), tensors outside the vector (`dense`), and values in sections."""


def kept_values(spec: TensorSpec, data: bytes) -> Values:
    """Values of a section's non-zeros, (non-zeros,) float32; variant prune stores them in the tensor's dtype."""
    import torch

    from compresskit.machine.precision import torch_dtype

    if not data:
        return np.zeros(0, np.float32)
    found: Values = torch.frombuffer(bytearray(data), dtype=torch_dtype(spec.dtype)).float().numpy()
    return found


def adapter_config(vector: TaskVector) -> dict[str, Any]:
    """The adapter_config.json of an adapter; {} of a checkpoint."""
    if not vector.is_adapter:
        return {}
    return vector.store.config if isinstance(vector, PlainVector) else read_json(vector.folder / CONFIG, LARGEST_CONFIG_BYTES)


def named_base(vector: TaskVector, remedy: str) -> Path:
    """Folder of the base that an adapter's configuration names; raises RequestError with the remedy if it names none."""
    name = adapter_config(vector).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{vector.folder / CONFIG}: names no base model; {remedy}")
    return source.resolve(name)


def is_ternary(folder: Path) -> bool:
    """Whether a folder holds a ternary file."""
    return (folder / ADAPTER_FILE).is_file() or (folder / MODEL_FILE).is_file()


def open_task_vector(folder: Path, base: Path | None, balance: bool = False) -> TaskVector:
    """Open a folder as a task vector. `base` belongs to a fine-tuned checkpoint; `balance` balances LoRA pairs.

    Returns:
        The vector; no values are read.

    Raises:
        CheckpointError: the folder holds no task vector, or its file is damaged.
        RequestError: a whole checkpoint came without its base, or the base does not belong to it.
    """
    if is_ternary(folder):
        adapter = (folder / ADAPTER_FILE).is_file()
        return TernaryVector(folder, open_container(folder / (ADAPTER_FILE if adapter else MODEL_FILE)), adapter)
    if (folder / CONFIG).is_file():
        return _adapter(folder, balance)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: has neither {CONFIG} nor config.json; point to a PEFT adapter, or to a checkpoint with --base"
        )
    store = open_dense(folder)
    if base is None:
        raise RequestError(f"{folder}: is a whole checkpoint; pass --base, the checkpoint that it was fine-tuned from")
    return _difference(store, open_dense(base))


def _adapter(folder: Path, balance: bool) -> PlainVector:
    store = open_tensors(folder)
    path, kind = folder / WEIGHTS, store.config.get("peft_type")
    if kind not in KINDS:
        known = f"only the parameters of {' and '.join(KINDS)} are a task vector"
        raise RequestError(f"{folder / CONFIG}: peft_type is {shown(kind)}, {known}; merge this adapter with peft first")
    check_read(folder / CONFIG, store.config)
    found = store.tensors
    factors = {n: spec for n, spec in found.items() if spec.dtype in FLOATS and any(part in n for part in FACTORS)}
    if not factors:
        raise CheckpointError(f"{path}: holds no factors of LoRA or IA3 ({', '.join(FACTORS)}); point to such an adapter")
    stated, experts = Stated(folder / CONFIG, store.config), dict[str, int]()
    for name in factors:
        first, second = (factors.get(each) for each in pair_of(name) or ("", ""))
        if first is None or second is None or name != first.name:
            continue
        if len(first.shape) != 2 or len(second.shape) != 2 or first.shape[0] != second.shape[1]:
            shapes = f"{list(first.shape)} and {list(second.shape)}"
            raise CheckpointError(f"{path}: {first.name} and its partner are {shapes}, which make no product; save it again")
        if balance or not store.config.get("target_parameters"):
            experts[name] = experts_of(stated, store.config, name, first.shape[0])
    return PlainVector(store, None, factors, {n: s for n, s in found.items() if n not in factors}, balance, experts=experts)


def _difference(store: Checkpoint, base: Checkpoint) -> PlainVector:
    for name, spec in store.tensors.items():
        if name not in base.tensors:
            hint = near_miss(name, base.tensors)
            raise RequestError(f"--base {base.folder}: has no tensor {name}; use the checkpoint that was fine-tuned.{hint}")
        if base.tensors[name].shape != spec.shape:
            shapes = f"{list(base.tensors[name].shape)} there, {list(spec.shape)} in {store.folder}"
            raise RequestError(f"--base {base.folder}: {name} is {shapes}; use the checkpoint that was fine-tuned")
    floats = {name: spec for name, spec in store.tensors.items() if spec.dtype in FLOATS}
    return PlainVector(store, base, floats, {n: spec for n, spec in store.tensors.items() if n not in floats})


def facts_of(vector: TernaryVector) -> dict[str, Any]:
    """Facts about a ternary vector for reports."""
    container = vector.container
    bits = 8 * sum(entry.bytes for entry in container.tensors.values())
    return {
        "variant": container.facts.variant,
        "density_achieved": container.nonzeros / max(1, container.entries),
        "alpha": container.facts.alpha,
        "entries": container.entries,
        "nonzeros": container.nonzeros,
        "bits_per_entry": bits / max(1, container.entries),
    }
