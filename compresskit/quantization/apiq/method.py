"""ApiQ with learned rounding and saliency-aware regularisation: train each block's quantisation on its output error.

ApiQ, arXiv 2402.05147, section 4 (block-wise form), with the regulariser of arXiv 2504.13932 and the rounding offsets of
SignRound, arXiv 2309.05516; the block's norms and biases are trained too, as in Norm Tweaking, arXiv 2309.02784. Two
streams of hidden states go through the model: X of the original blocks, X' of the quantised ones. For each block minimise

    L = mean over tokens of e_t / start  +  lambda * mean over W of sum(F * (W_q - W)^2) / sum(F * (W_0 - W)^2)            (1)

    e_t = mean(f (block_q(X') - block(X))_t^2) / max(mean(f block(X)_t^2), median over tokens of mean(f block(X)^2))

    W_q = s * (clamp(round(T / s + z + V), lowest, highest) - z) + B A                                                   (2)
    s, z = grid of [sigmoid(g_low) / sigmoid(g_0) * low, sigmoid(g_high) / sigmoid(g_0) * high]                          (3)

symbol         meaning                                             shape           name here
W              original weight                                     (out, in)       original
T              weight to round: W, or for the start from GPTQ W    (out, in)       target
               plus the errors passed on to it
V              rounding offset in [-1/2, 1/2], 0 at the start      (out, in)       offset
low, high      range of each group of W                            (out, groups)
g_low, g_high  clipping parameters, g_0 = 4 at the start           (out, groups)   low_clipping, high_clipping
A, B           low-rank pair                                       (r, in), (out, r)
F              saliency                                            (out, in)       saliency
f              Fisher diagonal of the block's output, of mean 1    (hidden,)       channels
W_0, start     the starting point, V = 0 and g = g_0; its mean of e_t

Norms and biases start at their original values and are stored in their own dtypes, so they cost no bits. round passes
gradients straight through, clamp inside its range. Both terms of (1) are 1 at the start, so lambda has no unit. The trained
block is kept only if its error over all windows is smaller than the starting point's.

Differs from the papers. The starting point is GPTQ's on X', linear after linear; A and B are the best rank-r repair of its
error (closed form, lowrank.py). The error of a token is normalised as in e_t: in blocks that create or remove massive
activations, a plain mean is the error of one token in five hundred, and training made the other tokens worse. Channels are
weighted by f: in Gemma 3 three of them hold 81 to 98% of the energy, and the loss hardly depends on them. V uses AdamW like
all other parameters. The sign of the gradient, as in SignRound, moves offsets equally whether or not they matter. Norms are
trained with the rest and towards the block's own output, not afterwards towards channel statistics. A norm or bias v becomes
v + |v| d with d trained: values of one norm of Gemma 3 differ a thousandfold, and one distance for all destroyed the small
ones. All rates fall linearly to 0. The clipping is divided by its starting value, so that training begins exactly at the
starting point. For measurements of each part see docs/evidence/quantize.md, of f and of norms docs/evidence/gemma.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.numerics.packed import QuantizedBlock, Storage
from compresskit.quantization.apiq.settings import ApiQSettings

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.models.model import Model
    from compresskit.walk.block import Block

WINDOWS_FOR_WEIGHTS, WINDOWS_FOR_CHANNELS = 16, 8
"""For the diagonals of weights, and of a block's few channels alone; their inputs lie on the disk meanwhile."""
HIDDEN_PER_RANK = 64
SMALLEST_RANK = 4


class ApiQ(ApiQSettings, frozen=True):
    """Block-wise training of rounding, clipping and a low-rank pair."""

    needs_activations: ClassVar[bool] = True

    def check(self, model: Model) -> None:
        """Check the format's limits and the adapter's.

        Raises:
            UnsupportedArchitecture: peft cannot reach experts.
            RequestError: the rank exceeds a linear, or is combined with mixed precision.
        """
        super().check(model)
        if self.scales_inputs and self.holds_by_fisher:
            raise RequestError(
                f"--scaling {self.scaling}: --saliency fisher is of the weights before they are scaled; pass --saliency none"
            )
        if model.architecture.has_experts and self.adapter_rank(model):
            raise UnsupportedArchitecture(f"{model.family}: adapters cannot reach its experts; pass --rank 0")
        if self.mixed and self.adapter_rank(model):
            mixed = "--bits-by" if self.unit_grids else f"--bits {self.average:g}"
            raise RequestError(f"{mixed} --rank {self.rank}: peft cannot open mixed precision; pass --rank 0")
        smallest = min(min(model.linear_shape(name)) for name in model.linears)
        if self.adapter_rank(model) > smallest:
            raise RequestError(f"--rank {self.rank}: exceeds {smallest}, the smallest side of a linear; lower it")

    @property
    def fisher_windows(self) -> int:
        """Windows from which the Fisher diagonals are measured; 0 if none are needed."""
        if self.epochs == 0:
            return 0
        if self.holds_by_fisher:
            return WINDOWS_FOR_WEIGHTS
        return WINDOWS_FOR_CHANNELS if self.output_weights == "fisher" else 0

    @property
    def holds_by_fisher(self) -> bool:
        """Whether the saliency of the weights is their Fisher diagonal."""
        return self.saliency == "fisher" and self.saliency_weight > 0 and self.epochs > 0

    @property
    def training_epochs(self) -> float:
        """Passes over every window in the training of a block."""
        return float(self.epochs)

    @property
    def windows_at_once(self) -> int:
        """Half a training batch, so that the windows of a step vary."""
        return max(1, self.batch // 2)

    @property
    def has_small_factors(self) -> bool:
        """Whether the adapter is stored in 8 bits."""
        return self.adapter_bits == 8

    def adapter_rank(self, model: Model) -> int:
        """The requested rank, or a share of the hidden size."""
        if self.rank is not None:
            return self.rank
        return 0 if self.mixed or model.architecture.has_experts else max(SMALLEST_RANK, model.hidden_size // HIDDEN_PER_RANK)

    def quantize_block(
        self,
        block: Block,
        targets: list[Tensor],
        sequence: Sequence[Sequence[tuple[str, ...]]],
        storage: Storage,
        saliencies: Mapping[str, Tensor],
    ) -> QuantizedBlock:
        """Start, train and keep the better result (equation 1). The block is edited in place and advanced."""
        from compresskit.quantization.apiq.trainer import Trainer

        trainer = Trainer(self, block, targets, storage, saliencies)
        trainer.start(sequence)
        before = trainer.block_error()
        trainer.train(before)
        after = trainer.settle()
        if after > before:
            trainer.reset()
            trainer.settle()
        block.hand_over(trainer.outputs)
        linears, vectors = trainer.stored()
        errors = {"start_error": before, "trained_error": after, "kept_error": min(before, after)}
        return QuantizedBlock(linears, vectors, errors | trainer.floor.facts())
