"""NF4: 4-bit codes on the quantiles of a normal distribution, in bitsandbytes' own format.

QLoRA, arXiv 2305.14314, section 3: blocks of 64 weights share their largest magnitude (1). `--nested` also stores the
magnitudes in 8 bits (double quantisation). The library computes the codes; no text is needed. Stored: 4.5 bits per weight,
4.127 nested.

    Q = argmin_i |W / absmax - q_i|,    q_i the 16 points of the codebook                                          (1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from compresskit.errors import UnsupportedArchitecture
from compresskit.formats import bitsandbytes
from compresskit.numerics.packed import QuantizedLinear
from compresskit.quantization.method import QuantizeMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.checkpoint.reader import TensorSpec
    from compresskit.models.model import Model
    from compresskit.numerics.scheme import Scheme
    from compresskit.walk.statistics import Gram


class NF4(QuantizeMethod, frozen=True):
    """bitsandbytes 4-bit."""

    block_size: Literal["64", "128", "256", "512", "1024", "2048", "4096"] = "64"
    """Block size: weights per magnitude."""
    nested: bool = True
    """Store the magnitudes in 8 bits (double quantisation)."""

    def check(self, model: Model) -> None:
        """Raise UnsupportedArchitecture for experts: stock tools keep them in 3-D tensors that 4-bit files cannot fill."""
        if model.architecture.has_experts:
            raise UnsupportedArchitecture(f"{model.family}: stock tools load no 4-bit experts; use quantize gptq --symmetric")

    def scheme(self, model: Model) -> Scheme | None:
        """None: NF4 has no affine grid."""
        return None

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: Scheme | None, scale_dtype: str) -> list[TensorSpec]:
        """Stored tensors of the linear (out, in) with this stored name."""
        return bitsandbytes.tensor_specs(name, shape, int(self.block_size), self.nested)

    def leading_tensors(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """The state of a linear (out, in) that is not quantised yet."""
        return {f"weight.{bitsandbytes.STATE}": bitsandbytes.empty_state(shape, int(self.block_size), self.nested)}

    def configuration(self, schemes: Mapping[str, Scheme | None], dense: list[str], dtype: str) -> dict[str, Any]:
        """`quantization_config` of bitsandbytes' 4-bit files."""
        return bitsandbytes.configuration(dtype, self.nested, dense)

    def quantize_group(
        self, weights: Sequence[Tensor], gram: Gram | None, scheme: Scheme | None, scale_dtype: torch.dtype
    ) -> list[QuantizedLinear]:
        """Equation 1 on each linear (out, in)."""
        return [QuantizedLinear(*bitsandbytes.quantize(w, int(self.block_size), self.nested), error=None) for w in weights]
