"""The factors that `quantize --scaling` folded into a model, as its manifest records them, and an original's weights with them.

A scaled weight is W' = diag(r)^-1 W diag(c): c are the factors of its inputs, r those of its outputs, 1 where there are none.

Does not import torch at module level.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.manifest import chain, recorded_hashes
from compresskit.checkpoint.small_files import first_line
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import CheckpointError, RequestError
from compresskit.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scalings:
    """Factors by plain name of the linears that have any."""

    columns: Mapping[str, Tensor]
    """c, (in,) float32."""
    rows: Mapping[str, Tensor]
    """r, (out,) float32."""

    def scaled(self, name: str, weight: Tensor) -> Tensor:
        """W' of an original's weight (out, in), which is returned as it is if it has no factors."""
        outputs = self.of_outputs(name, weight)
        columns = self.columns.get(name)
        return outputs if columns is None else outputs * columns.to(outputs)

    def of_outputs(self, name: str, weight: Tensor) -> Tensor:
        """diag(r)^-1 W of W (out, in): with it the original's own inputs give the scaled model's outputs."""
        rows = self.rows.get(name)
        return weight if rows is None else weight / rows.to(weight)[:, None]


def recorded(readers: Sequence[str], shared: tuple[int, int], factors: Tensor) -> dict[str, Any]:
    """What a manifest says of factors (out,) of a writer's outputs: the readers' names inside the block, shared heads, base64."""
    import torch

    values = factors.detach().to("cpu", torch.float32).contiguous().view(torch.uint8)
    return {"readers": list(readers), "shared": list(shared), "factors": base64.b64encode(bytes(values.tolist())).decode()}


def scaled_links(model: Model, original: Model) -> list[dict[str, Any]]:
    """Find the models between a model and its original that were scaled.

    Returns:
        Their manifests, newest first.

    Raises:
        RequestError: one of them was pruned later; factors are by channel and block.
    """
    found: list[dict[str, Any]] = []
    links = chain(model.checkpoint.manifest)
    if not any(map(_is_scaled, links)):
        return found
    pruned = False
    for link in links:
        if recorded_hashes(link) == original.checkpoint.hashes:
            break  # the original itself, with whatever was folded into it
        if pruned and _is_scaled(link):
            raise RequestError(
                f"{model.checkpoint.folder}: was scaled by --scaling, then pruned; pass the model that was pruned as the original"
            )
        pruned = pruned or link.get("stage") == "prune"
        found += [link] if _is_scaled(link) else []
    return found


def scalings(model: Model, original: Model) -> Scalings:
    """The factors between an original and a model that was made from it.

    Returns:
        Those of all links of the manifest that are newer than the original.

    Raises:
        RequestError: as `scaled_links`.
        CheckpointError: the manifest's factors do not fit the model.
    """
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    try:
        for link in scaled_links(model, original):
            for index, facts in enumerate(link["facts"]["blocks"]):
                for fact in facts["scaling"].values():
                    _add(model, index, fact, columns, rows)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{model.checkpoint.folder / MANIFEST}: says not by which factors the weights were scaled ({first_line(error)}); "
            "restore the file from its source"
        ) from error
    return Scalings(columns, rows)


def _is_scaled(link: Mapping[str, Any]) -> bool:
    settings = link.get("settings")
    return link.get("stage") == "quantize" and isinstance(settings, dict) and settings.get("scaling", "none") != "none"


def _add(model: Model, index: int, fact: Mapping[str, Any], columns: dict[str, Tensor], rows: dict[str, Tensor]) -> None:
    """Multiply the factors of one fold into those by linear; raises ValueError and others if they do not fit."""
    import torch

    if "factors" not in fact:
        return
    factors = torch.frombuffer(bytearray(base64.b64decode(fact["factors"], validate=True)), dtype=torch.float32)
    if not bool((factors.isfinite() & (factors > 0)).all()):
        raise ValueError(f"block {index}: factors that are not positive")
    heads, size = fact["shared"]
    block, spread = model.block_name(index), factors.view(-1, 1, size).expand(-1, heads, size).reshape(-1)
    found = [(columns, f"{block}.{name}", 1, spread) for name in fact["readers"]]
    writer = f"{block}.{fact['into']}"
    if writer in model.linears:
        found.append((rows, writer, 0, factors))
    for into, name, side, values in found:
        if name not in model.linears:
            raise ValueError(f"{name}: no such linear")
        if model.linear_shape(name)[side] != len(values):
            raise ValueError(f"{name}: {len(values)} factors, its shape is {list(model.linear_shape(name))}")
        into[name] = into[name] * values if name in into else values
