"""PEFT LoRA adapters: open a folder, compute the low-rank update of each linear, plan and describe new adapters.

    base_model.model.NAME.lora_A.weight  (rank, in)        update of NAME = scaling * B A
    base_model.model.NAME.lora_B.weight  (out, rank)       scaling = lora_alpha / rank, or / sqrt(rank) under use_rslora

Adapters written here have one lora_alpha for all linears, because not every client reads `alpha_pattern`: the largest rank,
times a fixed power of two for factors in 8 bits. B is stored divided by the scaling that follows from it (`multipliers`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import FLOATS, Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError, RequestError
from compresskit.formats import adapter_files
from compresskit.formats.adapter_files import open_tensors
from compresskit.formats.adapter_kinds import base_change, check_plain
from compresskit.formats.patterns import Patterns

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "adapter"
"""Folder inside a checkpoint for the adapter that belongs to it."""
CONFIG, WEIGHTS, PREFIX = adapter_files.CONFIG, adapter_files.WEIGHTS, adapter_files.PREFIX
EIGHT_BITS = "F8_E4M3"
"""Dtype of factors in 8 bits, as safetensors names it."""
EIGHT_BIT_SCALE = 2.0**-12
"""lora_alpha of an adapter in 8 bits, as a share of its largest rank. A rank whose largest entries of A and B have a product
up to 16 can be stored; repairs of a 3-bit model of 135M parameters reach 0.6, and their mean entries 2^-10."""
USUAL_ALPHA = USUAL_RANK = 8
"""lora_alpha and r of a configuration that states none (peft's LoraConfig)."""
ALL_LINEARS = "all-linear"
"""target_modules that means every linear but the output layer."""


def factor_names(name: str) -> tuple[str, str]:
    """Stored names of A and B for the linear with this module name."""
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def factor_specs(name: str, shape: tuple[int, int], rank: int, dtype: str) -> list[TensorSpec]:
    """Stored factors of one linear (out, in)."""
    first, second = factor_names(name)
    return [TensorSpec(first, dtype, (rank, shape[1])), TensorSpec(second, dtype, (shape[0], rank))]


def adapter_specs(ranks: Mapping[str, int], shape_of: Callable[[str], tuple[int, int]], dtype: str) -> list[TensorSpec]:
    """Factors of an adapter. `ranks`: by module name; `shape_of`: module name -> (out, in)."""
    return [spec for name, rank in ranks.items() for spec in factor_specs(name, shape_of(name), rank, dtype)]


def multipliers(ranks: Mapping[str, int], small: bool = False) -> dict[str, float]:
    """By what readers multiply each stored product B A under `configuration(base, ranks, small)`, by module name."""
    return {name: max(ranks.values()) / rank * (EIGHT_BIT_SCALE if small else 1.0) for name, rank in ranks.items()}


def configuration(base: str, ranks: Mapping[str, int], small: bool = False) -> dict[str, Any]:
    """adapter_config.json of an adapter. `ranks`: by module name; `small`: whether its factors are stored in 8 bits."""
    common = max(ranks.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": common * EIGHT_BIT_SCALE if small else common,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": {},
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in ranks}) if _covers_all(ranks) else sorted(ranks),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_dora": False,
        "use_rslora": False,
        "modules_to_save": None,
    }


def factor_dtype(bits: int, wide: str) -> str:
    """Safetensors dtype of factors stored in 8 or 16 bits; `wide` is the model's 16-bit dtype."""
    return EIGHT_BITS if bits == 8 else wide


def _covers_all(ranks: Mapping[str, int]) -> bool:
    """Whether all kinds of linear occur in equally many blocks, so that short names target exactly these."""
    kinds: dict[str, int] = {}
    for name in ranks:
        kind = name.rsplit(".", 1)[-1]
        kinds[kind] = kinds.get(kind, 0) + 1
    return len(set(kinds.values())) == 1


def config_text(base: str, ranks: Mapping[str, int], small: bool = False) -> str:
    """Text of adapter_config.json."""
    return json.dumps(configuration(base, ranks, small), indent=2) + "\n"


class Stated:
    """What adapter_config.json states of each linear: that it has factors, their rank, and how strongly they act."""

    def __init__(self, path: Path, config: Mapping[str, Any]):
        """`path`: of the configuration, for errors."""
        self.path, self.config = path, config
        self._alphas, self._ranks = Patterns(f"{path}: alpha_pattern"), Patterns(f"{path}: rank_pattern")
        self._targets = Patterns(f"{path}: target_modules")

    def scaling(self, name: str, rank: int) -> float:
        """Look up the scaling of the linear with this module name and rank.

        Returns:
            lora_alpha / rank, or lora_alpha / sqrt(rank) under use_rslora.

        Raises:
            CheckpointError: lora_alpha is no number, or alpha_pattern has none.
        """
        alpha = self._stated("alpha_pattern", self._alphas, name, self.config.get("lora_alpha", USUAL_ALPHA))
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            what = f"lora_alpha of {name} is {shown(alpha)}, expected a number"
            raise CheckpointError(f"{self.path}: {what}; restore the file")
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def rank(self, name: str) -> int:
        """Look up the rank that the configuration states for a linear; raises CheckpointError if it states no whole number."""
        rank = self._stated("rank_pattern", self._ranks, name, self.config.get("r", USUAL_RANK))
        if type(rank) is not int or rank < 1:
            raise CheckpointError(f"{self.path}: r of {name} is {shown(rank)}, expected a whole number; restore the file")
        return rank

    def check_rank(self, name: str, stored: int) -> None:
        """Raise CheckpointError if the stored factors of a linear have another rank than the configuration states."""
        stated = self.rank(name)
        if stored != stated:
            what = f"r of {name} is {stated}, the rank of its factors is {stored}, which peft refuses"
            raise CheckpointError(f"{self.path}: {what}; restore the file")

    def check_targeted(self, name: str) -> None:
        """Raise CheckpointError if the configuration gives this module no factors: peft would pass over the stored ones."""
        targets = self.config.get("target_modules")
        if targets in (None, ALL_LINEARS) or self.config.get("target_parameters"):
            return
        if isinstance(targets, str):
            found = self._targets.match("(?:", targets, ")$", name)
        else:
            parts = name.split(".")
            found = any(".".join(parts[start:]) in self._target_names for start in range(len(parts)))
        if not found:
            what = f"target_modules does not mean {name}, so that peft passes over its factors"
            raise CheckpointError(f"{self.path}: {what}; restore the file")

    @cached_property
    def _target_names(self) -> frozenset[str]:
        """The names in a list of targets: of modules, or their last parts."""
        targets = self.config.get("target_modules")
        return frozenset(each for each in targets if isinstance(each, str)) if isinstance(targets, list) else frozenset()

    def _stated(self, key: str, matcher: Patterns, name: str, usual: Any) -> Any:
        """What a pattern states for a name, else `usual`. As peft: the first key that a whole last part of the name matches."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, dict):
            what = f"{key} is {shown(patterns)}, expected numbers by name"
            raise CheckpointError(f"{self.path}: {what}; restore the file")
        return next((value for pattern, value in patterns.items() if matcher.match(r"(.*\.)?(", pattern, ")$", name)), usual)


@dataclass(frozen=True)
class Adapter:
    """An opened LoRA adapter folder; no weights are read."""

    folder: Path
    config: dict[str, Any]
    store: Checkpoint

    def holds(self, name: str) -> bool:
        """Whether the adapter updates the linear with this module name."""
        return factor_names(name)[0] in self.store.tensors

    @property
    def names(self) -> list[str]:
        """Module names of the updated linears."""
        ending = ".lora_A.weight"
        return [n.removeprefix(PREFIX).removesuffix(ending) for n in self.store.tensors if n.endswith(ending)]

    @property
    def is_made(self) -> bool:
        """Whether the tensors have other names or values than in the file."""
        return type(self.store) is not Checkpoint or self.store.stored is not None

    @property
    def parameters(self) -> int:
        """Number of stored values."""
        return self.store.parameters

    def rank(self, name: str) -> int:
        """Rank of one linear's factors, 0 if there are none."""
        return self.store.spec(factor_names(name)[0]).shape[0] if self.holds(name) else 0

    def scaling(self, name: str) -> float:
        """Scaling of one linear, including patterns; raises CheckpointError if its lora_alpha is no number."""
        return self.stated.scaling(name, self.rank(name))

    @cached_property
    def stated(self) -> Stated:
        """What the configuration says."""
        return Stated(self.folder / CONFIG, self.config)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Read (A (rank, in), B (out, rank) times the scaling) of one linear, float32."""
        first, second = (self.store.read(each).float() for each in factor_names(name))
        return first, self.scaling(name) * second

    def update(self, name: str) -> Tensor:
        """Compute the update of one linear, (out, in) float32."""
        first, second = self.factors(name)
        return second @ first


def open_adapter(folder: Path) -> Adapter:
    """Open a LoRA adapter folder.

    Returns:
        Its configuration and the shapes of its factors; no weights are read.

    Raises:
        CheckpointError: the folder holds no adapter.
        RequestError: the adapter's update is not a plain low-rank product.
    """
    store = open_tensors(folder)
    path = folder / CONFIG
    check_plain(path, store.config)
    base_change(path, store.config)
    unknown = [name for name in store.tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if unknown:
        raise RequestError(f"{folder / WEIGHTS}: holds {unknown[0]}, which is no LoRA factor; merge the adapter with peft first")
    _check_factors(store)
    adapter = Adapter(folder, store.config, store)
    for name in adapter.names:
        adapter.stated.check_targeted(name)
        adapter.stated.check_rank(name, adapter.rank(name))
    return adapter


def _check_factors(store: Checkpoint) -> None:
    """Raise CheckpointError unless every tensor has its partner, and they are the factors of one product."""
    for name, spec in store.tensors.items():
        wanted = "floating-point factors A (rank, in) and B (out, rank); save the adapter again with peft"
        first, second = name.replace(".lora_B.weight", ".lora_A.weight"), name.replace(".lora_A.weight", ".lora_B.weight")
        found = [store.tensors[each].shape for each in (first, second) if each in store.tensors]
        right = len(found) == 2 and all(len(shape) == 2 for shape in found)
        if not (right and name.startswith(PREFIX) and spec.dtype in FLOATS and found[0][0] == found[1][1] > 0):
            what = f"{name} is {spec.dtype} {list(spec.shape)}"
            raise CheckpointError(f"{store.file_of[name]}: {what}, expected below {PREFIX} the {wanted}")
