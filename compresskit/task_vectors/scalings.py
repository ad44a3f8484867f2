"""Scalings of LoRA factors, and how factors of several adapters are brought to one, so that their effects are merged.

    update of a linear by source i = s_i B_i A_i                                                                (1)
                                   = s B'_i A_i,    B'_i = (s_i / s) B_i,    s = the s_i of largest magnitude   (2)

Where all s_i of a linear are equal, B'_i = B_i: factors are merged as they are stored. The result keeps the configuration of
the first source, so the merged B' is written as (s / s_1) B'. The update is then the same for any order of the sources.

symbol  meaning                                                          shape         name here
s_i     scaling stated by a source (formats/peft.py)                     ()            own
s       scaling at which the linear's factors are merged                 ()            common
A_i     first factor                                                     (rank, in)
B_i     second factor, or its bias                                       (out, rank)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compresskit.errors import CheckpointError, RequestError
from compresskit.formats.peft import CONFIG, Stated
from compresskit.task_vectors.pairs import factors_of, is_second, module_of
from compresskit.task_vectors.vector import PlainVector, TaskVector, adapter_config

REMEDY = "pass --rank to merge updates of the weights"


def scalings_of(vector: TaskVector) -> dict[str, float]:
    """Read the scalings that an adapter states.

    Returns:
        By module name; empty for checkpoints and for adapters without LoRA factors.

    Raises:
        CheckpointError: a LoRA factor has no partner of a fitting shape, or the configuration states no scaling.
    """
    pairs = {name: factors_of(name) for name in vector.specs} if vector.is_adapter else {}
    if not any(pairs.values()):
        return {}
    path = vector.folder / CONFIG
    stated, found = Stated(path, adapter_config(vector)), dict[str, float]()
    for name, pair in pairs.items():
        if pair is None:
            continue
        shapes = [vector.specs[each].shape for each in pair if each in vector.specs]
        if len(shapes) < 2 or not all(len(shape) == 2 for shape in shapes) or not shapes[0][0] == shapes[1][1] > 0:
            what = f"{name} is {list(vector.specs[name].shape)} and has no partner with which it makes a product"
            raise CheckpointError(f"{_file(vector)}: {what}; save the adapter again with peft")
        module = module_of(name)
        if module not in found:
            # Factors of experts are stacked: their rank is the stated one, not the stored one.
            rank = stated.rank(module) if stated.config.get("target_parameters") else shapes[0][0]
            found[module] = stated.scaling(module, rank)
    return found


def _file(vector: TaskVector) -> Path:
    """The weight file of an adapter."""
    return vector.store.files[0] if isinstance(vector, PlainVector) else vector.container.path


@dataclass(frozen=True)
class CommonScaling:
    """The scalings of vectors of the same tensors, and one for each module."""

    folders: list[Path]
    own: list[dict[str, float]]
    """Scalings by module name, of each vector."""

    def common(self, module: str) -> float:
        """The scaling of largest magnitude."""
        return max((each[module] for each in self.own), key=abs)

    def share(self, source: int, name: str) -> np.float32:
        """Factor s_i / s of a source's B, from -1 to 1; 1 for its other tensors."""
        module = module_of(name)
        known = is_second(name) and module in self.own[source]
        return self._share(source, module) if known else np.float32(1)

    def _share(self, source: int, module: str) -> np.float32:
        """Factor s_i / s of a source; 1 where all scalings are 0."""
        common = self.common(module)
        return np.float32(self.own[source][module] / common if common else 1)

    def written(self, name: str) -> float:
        """Factor s / s_1 of the merged B', of magnitude 1 or more; 1 for other tensors."""
        return 1.0 if self.share(0, name) == 1 else self.common(module_of(name)) / self.own[0][module_of(name)]

    @property
    def differ(self) -> bool:
        """Whether the vectors state different scalings of a module, beyond rounding to float32."""
        return any(self._share(source, module) != 1 for source, own in enumerate(self.own) for module in own)

    def check_written(self) -> None:
        """Raise RequestError if the first source states a scaling of 0 for what another source updates."""
        for module, scaling in self.own[0].items():
            if not scaling and self.common(module):
                other = next(folder for folder, own in zip(self.folders, self.own, strict=True) if own[module])
                what = f"lora_alpha of {module} is 0, which the merged adapter cannot keep beside that of {other}"
                raise RequestError(f"{self.folders[0] / CONFIG}: {what}; {REMEDY}, or give that source first")

    def too_large(self, name: str, dtype: str) -> RequestError:
        """The error of a merged B that its dtype cannot hold at the first source's scaling."""
        module = module_of(name)
        what = f"scales {module} by {self.own[0][module]:g} and another source by {self.common(module):g}"
        why = f"so that the merged factors exceed {dtype}"
        return RequestError(f"{self.folders[0] / CONFIG}: {what}, {why}; {REMEDY}, or give that source first")


def common_scaling(vectors: list[TaskVector]) -> CommonScaling:
    """Read the scalings of vectors of the same tensors; raises CheckpointError if one cannot be told."""
    return CommonScaling([vector.folder for vector in vectors], [scalings_of(vector) for vector in vectors])
