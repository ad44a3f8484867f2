"""The pairs of LoRA factors in an adapter: their names, what they belong to, and balanced, which changes no update.

lora_A starts from noise three times as large as what lora_B learns, lora_embedding_B from noise of N(0, 1). One threshold for
both factors would keep the noise and drop the learned values. The balanced pair (numerics/lowrank.py) is the same update with
factors of equal weight, and its ranks are sorted by their effect.

    experts        A holds the ranks of all experts, one expert after the other, B has the experts last:
                   update of expert e = B.reshape(out, rank, experts)[:, :, e] A.reshape(experts, rank, in)[e]
    embeddings     A' is (rank, vocabulary), B' (hidden, rank): equal norms would make the entries of B' many times larger, so
                   c A' and B' / c are taken, with c^4 = entries of A' / entries of B', of the same root mean square
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from compresskit.errors import RequestError
from compresskit.formats.peft import PREFIX, Stated

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = re.compile(r"(.*\.lora_(?:embedding_)?)([AB])(.*)", re.DOTALL)
"""What precedes the side of a LoRA parameter, the side, and what follows it."""
EMBEDDING = ".lora_embedding_"
BIAS = ".bias"
COPY_OF_BASE = ".base_layer.weight"
"""End of the name of a weight of the base, which peft saves beside the factors of an embedding."""
EVERY_LINEAR, EMBEDDINGS = "linears", "embeddings"
"""Groups of a vector's tensors, each with its own threshold and scale."""


def module_of(name: str) -> str:
    """Module name of the linear or embedding of a LoRA parameter, such as x for base_model.model.x.lora_A.weight."""
    return name.removeprefix(PREFIX).rpartition(".lora_")[0]


def is_second(name: str) -> bool:
    """Whether a tensor is the B of a pair, or the bias of one."""
    found = FACTOR.fullmatch(name)
    return found is not None and found[2] == "B"


def factors_of(name: str) -> tuple[str, str] | None:
    """Names of A and B of the product to which a LoRA parameter belongs; None for other tensors."""
    found = FACTOR.fullmatch(name)
    if found is None:
        return None
    ending = found[3].removesuffix(BIAS) + ".weight" if found[3].endswith(BIAS) else found[3]
    return f"{found[1]}A{ending}", f"{found[1]}B{ending}"


def pair_of(name: str) -> tuple[str, str] | None:
    """Names of A and B of the pair that this factor is a part of; None for a bias and other tensors."""
    return None if name.endswith(BIAS) else factors_of(name)


def group_of(name: str) -> str:
    """Group of a tensor of the vector: what embeddings learn is of another size than what all else learns."""
    return EMBEDDINGS if EMBEDDING in name else EVERY_LINEAR


def experts_of(stated: Stated, config: Mapping[str, Any], name: str, stored_rank: int) -> int:
    """Look up of how many experts a pair holds the factors.

    Returns:
        Their number; 1 for a linear or an embedding.

    Raises:
        RequestError: the configuration does not tell.
        CheckpointError: the stored rank contradicts it.
    """
    module = module_of(name)
    if not config.get("target_parameters"):
        stated.check_targeted(module)
        stated.check_rank(module, stored_rank)
        return 1
    if config.get("rank_pattern"):
        what = f"rank_pattern beside target_parameters does not tell the rank of {module}"
        raise RequestError(f"{stated.path}: {what}; pass --no-balance")
    experts, rest = divmod(stored_rank, stated.rank(module))
    if rest:
        stated.check_rank(module, stored_rank)
    return experts


def balanced(name: str, first: Tensor, second: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Balance a pair: A (experts * rank, in), B (out, experts * rank) float32 -> the same shapes, with the same updates."""
    import torch

    from compresskit.numerics.lowrank import balanced_factors

    if experts > 1:
        parts = zip(first.reshape(experts, -1, first.shape[1]), second.reshape(len(second), -1, experts).unbind(2), strict=True)
        pairs = [balanced_factors(*part) for part in parts]
        return torch.cat([a for a, _ in pairs]), torch.stack([b for _, b in pairs], dim=2).reshape(second.shape)
    first, second = balanced_factors(first, second)
    if EMBEDDING in name:
        ratio = (first.numel() / second.numel()) ** 0.25
        first, second = first * ratio, second / ratio
    return first, second
