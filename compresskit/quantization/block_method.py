"""Interface of quantization methods that train whole blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from compresskit.models.model import Model
from compresskit.numerics.packed import QuantizedBlock, Storage
from compresskit.quantization.method import GridMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.walk.block import Block


class BlockMethod(GridMethod):
    """Quantisation that trains whole blocks on two streams of hidden states, with an optional adapter."""

    trains_blocks: ClassVar[bool] = True

    @property
    def fisher_windows(self) -> int:
        """Windows for the Fisher diagonals of the blocks' outputs, 0 if none are needed."""
        return 0

    @property
    def holds_by_fisher(self) -> bool:
        """Whether those of the weights are needed too."""
        return False

    @property
    def training_epochs(self) -> float:
        """Passes over every window in the training of a block."""
        return 1.0

    @property
    def windows_at_once(self) -> int:
        """Maximum number of calibration windows in a micro-batch."""
        raise TypeError(f"{type(self).__name__} defines no windows_at_once")

    def adapter_rank(self, model: Model) -> int:
        """Rank of the low-rank pair of every linear, 0 for none."""
        raise TypeError(f"{type(self).__name__} defines no adapter_rank")

    @property
    def has_small_factors(self) -> bool:
        """Whether the adapter is stored in 8 bits, with a scale per linear."""
        return False

    def quantize_block(
        self,
        block: Block,
        targets: list[Tensor],
        sequence: Sequence[Sequence[tuple[str, ...]]],
        storage: Storage,
        saliencies: Mapping[str, Tensor],
    ) -> QuantizedBlock:
        """Quantise one block of the quantised stream and advance it.

        `targets`: the original block's outputs, one (batch, length, hidden) per micro-batch. `sequence`: the linears to quantise,
        as `Model.linear_sequence` gives them. `saliencies`: by plain name, (out, in) each, if the method needs them.

        Raises:
            TypeError: the method does not implement it.
        """
        raise TypeError(f"{type(self).__name__} defines no quantize_block")
