"""A compressed model and its original: check that they belong together, and match their weights.

Does not import torch at module level, so a wrong pair is refused in under a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.small_files import first_line, read_bytes, read_json, shown
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import CheckpointError, RequestError
from compresskit.models.model import Ffn, FfnGroup, Model
from compresskit.models.prunings import channel_prunings, check_same_parts, kept_by_linear
from compresskit.models.scalings import Scalings, scaled_links, scalings

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Pair:
    """A compressed model and its original."""

    compressed: Model
    original: Model
    kept: dict[str, list[int]]
    """The original's channels that were kept, in order, by plain name of each linear that lost channels."""

    def lost_inputs(self, name: str) -> bool:
        """Whether the linear has fewer input channels than the original's."""
        return name in self.kept and any(name == ffn.out_projection for ffn, _ in self._networks(name))

    @cached_property
    def scalings(self) -> Scalings:
        """Factors that `quantize --scaling` folded into the compressed model."""
        return scalings(self.compressed, self.original)

    def original_weight(self, name: str) -> Tensor:
        """The original's weight (out, in) float32 in the compressed model's place: cut, padded and scaled like its weight."""
        return self.scalings.scaled(name, self._cut_weight(name))

    def aimed_weight(self, name: str) -> Tensor:
        """Like `original_weight`, but for the original's own inputs: it gives the outputs at which the compressed one aims."""
        return self.scalings.of_outputs(name, self._cut_weight(name))

    def _cut_weight(self, name: str) -> Tensor:
        import torch

        from compresskit.models.meta import read_plain

        weight = read_plain(self.original, f"{name}.weight").float()
        if name not in self.kept:
            return weight
        chosen = torch.tensor(self.kept[name])
        rows, columns = self.compressed.linear_shape(name)
        if self.lost_inputs(name):
            found = weight[:, chosen]
            return torch.cat([found, found.new_zeros(rows, columns - len(chosen))], dim=1)
        return self._cut_rows(name, weight)

    def cut_outputs(self, name: str, values: Tensor) -> Tensor:
        """Values by squared output of the original's linear, (out,), for the compressed one's outputs; padded ones get 0."""
        if name in self.kept and not self.lost_inputs(name):
            values = self._cut_rows(name, values[:, None])[:, 0]
        rows = self.scalings.rows.get(name)
        return values if rows is None else values * rows.to(values).square()

    def _cut_rows(self, name: str, weight: Tensor) -> Tensor:
        import torch

        from compresskit.numerics.rows import join_rows, split_rows

        rows, chosen = self.compressed.linear_shape(name)[0], torch.tensor(self.kept[name])
        group = next(group for ffn, group in self._networks(name) if name in ffn.in_projections)
        parts = [part[chosen] for part in split_rows(weight, group.fused, group.interleaved)]
        missing = rows // group.fused - len(chosen)
        return join_rows([torch.cat([part, part.new_zeros(missing, weight.shape[1])]) for part in parts], group.interleaved)

    def _networks(self, name: str) -> list[tuple[Ffn, FfnGroup]]:
        groups = self.compressed.ffn_groups(self.compressed.block_of(name))
        return [(ffn, group) for group in groups for ffn in group.members]


def pair(compressed: Model, original: Model) -> Pair:
    """Check that the two models belong together.

    Returns:
        The two models and the channels kept by pruning.

    Raises:
        RequestError: family, vocabulary, tokenizer or shapes differ, except by the kept channels that the manifest records.
    """
    here, there = compressed.checkpoint.folder, original.checkpoint.folder
    facts = {
        "family": (compressed.family, original.family),
        "vocabulary": (compressed.vocabulary, original.vocabulary),
        "hidden size": (compressed.hidden_size, original.hidden_size),
        "number of blocks": (compressed.block_count, original.block_count),
    }
    scaled_links(compressed, original)
    check_same_parts(compressed, original)
    for what, (ours, theirs) in facts.items():
        if ours != theirs:
            raise RequestError(f"{here}: its {what} is {ours}, that of {there} is {theirs}; pass the model it was made from")
    if different_tokenizers(here, there):
        raise RequestError(f"{here}: its tokenizer is not that of {there}; pass the model it was made from")
    kept = _kept_by_linear(compressed, original)
    for name in compressed.linears:
        if name not in kept and compressed.linear_shape(name) != original.linear_shape(name):
            ours, theirs = (list(model.linear_shape(name)) for model in (compressed, original))
            raise RequestError(
                f"{here}: {name} is {ours}, in {there} {theirs}, and no manifest says which channels were kept; "
                "pass the model it was made from"
            )
    return Pair(compressed, original, kept)


def same_weights(both: Pair) -> bool:
    """Whether all linears of the two models are identical, bit for bit; stops at the first difference."""
    compressed, original = both.compressed, both.original
    if both.kept or compressed.quantized or compressed.adapter or original.quantized:
        return False
    import torch

    from compresskit.models.meta import read_plain

    names = [f"{name}.weight" for name in compressed.linears]
    return all(torch.equal(read_plain(compressed, name), read_plain(original, name)) for name in names)


def different_tokenizers(first: Path, second: Path) -> bool:
    """Whether the folders' tokenizer.json differ in vocabulary or merges, if both exist; raises CheckpointError if broken."""
    files = [folder / TOKENIZER for folder in (first, second)]
    if not all(file.is_file() for file in files) or read_bytes(files[0]) == read_bytes(files[1]):
        return False
    models: list[Any] = [read_json(file).get("model") for file in files]
    for file, model in zip(files, models, strict=True):
        if not isinstance(model, dict):
            raise CheckpointError(f"{file}: no usable tokenizer (its model is {shown(model)}); restore the file")
    return any(models[0].get(key) != models[1].get(key) for key in ("vocab", "merges"))


def _kept_by_linear(compressed: Model, original: Model) -> dict[str, list[int]]:
    """Kept channels of the linears that lost any; empty if all shapes match."""
    prunings = channel_prunings(compressed)
    last = [group.members[0].out_projection for i in range(compressed.block_count) for group in compressed.ffn_groups(i)]
    alike = all(compressed.linear_shape(name) == original.linear_shape(name) for name in last)
    # Same shapes mean padding to the original's width, or that the original is the pruned model; the hashes decide.
    if alike and not any(_inputs(link) == original.checkpoint.hashes for link in prunings):
        return {}
    if len(prunings) != 1:
        raise RequestError(
            f"{compressed.checkpoint.folder}: its FFN widths are not those of {original.checkpoint.folder}, and its manifest "
            f"records {len(prunings)} prunings; pass the model that it was pruned from in one step"
        )
    try:
        return kept_by_linear(prunings[0]["facts"]["blocks"], compressed, original)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{compressed.checkpoint.folder / MANIFEST}: says not which channels were kept ({first_line(error)}); "
            "restore the file from its source"
        ) from error


def _inputs(link: dict[str, Any]) -> Any:
    """SHA-256 by file of a manifest's source; None if it states none."""
    inputs = link.get("inputs")
    return inputs.get("sha256") if isinstance(inputs, dict) else None
