"""Distillation into the grid: a low-bit model's codes, scales, norms and biases are trained; its file keeps size and format.

EfficientQAT, arXiv 2407.11062, section 3.3, trains the scales of the whole model on its loss; with --train all the codes too, by
straight-through rounding, as quantisation-aware distillation does (arXiv 2601.20088). The loss is that of `recover`.

    W_q = s (clamp(round(V), lowest, highest) - z)                                                        (1)
    dL/dV = s dL/dW_q where round(V) lies within the codes' range, else 0                                  (2)
    dL/ds = sum over the group of dL/dW_q (Q - z)                                                           (3)
    s = s_0 (1 + d),    v = v_0 + |v_0| d                                                                   (4)

symbol  meaning                                              shape           name here
V       latent weight in steps of the grid                   (out, in)       latent
Q       code, clamp(round(V), lowest, highest)               (out, in)
s, s_0  scale, scale at the start                            (out, groups)   scale
z       zero point, which stays                              (out, groups)   zero_point
v, v_0  a norm or a bias, and its start
d       relative change, 0 at the start

V starts at the original weight, moved into the cell of the stored code and a little away from its borders: the model starts as it
is stored, and each weight knows to which of its neighbours it is nearer. AdamW moves all V by about the same distance, so their
starts must differ: where all started at their codes, they crossed into the next ones within a few steps, and the model was lost.
Every step computes with s and v rounded to their stored dtypes, so what is written is what was trained. The released code of
EfficientQAT trains float32 scales and rounds them after it has measured them. Measured in docs/evidence/recover.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from compresskit.formats.compressed_tensors import PackQuantized, stored_linear
from compresskit.machine.precision import torch_dtype
from compresskit.models import meta
from compresskit.models.model import Model
from compresskit.models.scalings import scalings
from compresskit.numerics.grid import Grid, grouped
from compresskit.numerics.scheme import Scheme
from compresskit.numerics.straight_through import straight_through
from compresskit.recovery.training.networks import PartlyTrained

LATENT_EPSILON = 1e-12
"""Of AdamW for latents: their gradients are those of weights times a scale, and its own 1e-8 would hold them."""
INSIDE = 0.45
"""Furthest that V starts from the stored code, in steps: at half a step the first move of any size would change the code."""


class _GridWeight(torch.autograd.Function):
    """Equation 1, with the gradients of equations 2 and 3; the codes are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, scale: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
        """W_q (out, in) of latent (out, in), scale and zero_point (out, groups); all float32."""
        ctx.save_for_backward(latent, scale, zero_point)
        ctx.scheme = scheme
        return (_steps(latent, zero_point, scheme) * scale.unsqueeze(-1)).flatten(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        """The gradients of latent, if it is trained, and of scale."""
        latent, scale, zero_point = ctx.saved_tensors
        gradient = grouped(gradients[0].float(), ctx.scheme)
        of_scale = (gradient * _steps(latent, zero_point, ctx.scheme)).sum(dim=-1)
        if not ctx.needs_input_grad[0]:
            return None, of_scale, None, None
        rounded = latent.round()
        outside = (rounded < ctx.scheme.lowest) | (rounded > ctx.scheme.highest)
        return (gradient * scale.unsqueeze(-1)).flatten(1).masked_fill_(outside, 0), of_scale, None, None


def _steps(latent: Tensor, zero_point: Tensor, scheme: Scheme) -> Tensor:
    """Codes less their zero points, (out, groups, group) float32; latent may be int8 codes."""
    codes = latent.float() if latent.dtype == torch.int8 else latent.round().clamp_(scheme.lowest, scheme.highest)
    return grouped(codes, scheme) - zero_point.unsqueeze(-1)


class Relative(nn.Module):
    """A vector trained in shares of its own start, equation 4, and rounded to its stored dtype."""

    def __init__(self, start: Tensor, dtype: torch.dtype):
        """`start` in any shape."""
        super().__init__()
        self.dtype = dtype
        self.start: Tensor
        self.register_buffer("start", start.detach().clone(), persistent=False)

    def forward(self, change: Tensor) -> Tensor:
        """The value at a relative change of the same shape."""
        exact = self.start + self.start.abs() * change
        return straight_through(exact, exact.to(self.dtype).to(exact.dtype))

    def right_inverse(self, value: Tensor) -> Tensor:
        """No change, whatever the value: it is the start."""
        return torch.zeros_like(value)


class GridLinear(nn.Module):
    """A packed linear in training."""

    def __init__(self, latent: Tensor, zero_point: Tensor, scale: Tensor, scheme: Scheme, bias: nn.Parameter | None):
        """Take latent (out, in), float32 to train or int8 codes that stay; zero_point and stored scale (out, groups)."""
        super().__init__()
        self.scheme, self.scale_dtype = scheme, scale.dtype
        self.in_features, self.out_features = latent.shape[1], latent.shape[0]
        self.zero_point: Tensor
        self.register_buffer("zero_point", zero_point.float(), persistent=False)
        self.latent: Tensor
        if latent.dtype == torch.int8:
            self.register_buffer("latent", latent, persistent=False)
        else:
            self.latent = nn.Parameter(latent)
        self.scale = nn.Parameter(scale.float())
        parametrize.register_parametrization(self, "scale", Relative(self.scale, scale.dtype))
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """Equation 1, (out, in) float32."""
        found: Tensor = _GridWeight.apply(self.latent, self.scale, self.zero_point, self.scheme)  # type: ignore[no-untyped-call]
        return found

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return functional.linear(inputs, self.weight, self.bias)

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by leaf name."""
        steps = _steps(self.latent, self.zero_point, self.scheme)
        codes = (steps + self.zero_point.unsqueeze(-1)).flatten(1).cpu()
        grid = Grid(self.scale.cpu(), self.zero_point.cpu())
        return stored_linear(codes, grid, self.scheme, self.scale_dtype)[0]


class GridModel(PartlyTrained):
    """A low-bit network in which grids, norms and biases are trained."""

    def __init__(self, network: PreTrainedModel, model: Model, original: Model | None):
        """`original` holds the weights at which latents start; None trains no codes.

        `network` is the model in plain form, float32; its packed linears are replaced. What it has on the meta device is not
        trained.
        """
        super().__init__(network.requires_grad_(False))
        there = {name: parameter.ndim for name, parameter in network.named_parameters() if not parameter.is_meta}
        self.linears = [name for name in model.linears if model.is_low_bit(name) and f"{name}.weight" in there]
        self.vectors = {
            name: torch_dtype(model.checkpoint.spec(model.stored_name(name)).dtype)
            for name, dimensions in there.items()
            if dimensions == 1 and model.has(name)
        }
        folded = scalings(model, original) if original is not None else None
        for name in self.linears:
            start = None
            if original is not None and folded is not None:
                start = meta.read_plain(original, f"{name}.weight").float()
                start = folded.scaled(name, start) if start.shape == model.linear_shape(name) else start
            network.set_submodule(name, _grid_linear(network, model, start, name))
        for name, dtype in self.vectors.items():
            owner, leaf = _owner(network, name)
            getattr(owner, leaf).requires_grad_(True)
            parametrize.register_parametrization(owner, leaf, Relative(getattr(owner, leaf), dtype))

    def parameter_groups(self, rate: float, code_rate: float) -> list[dict[str, Any]]:
        """Groups for an optimiser: relative changes at `rate`, latents at `code_rate` steps of the grid."""
        trained = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        latents = [p for name, p in trained if name.endswith(".latent")]
        groups: list[dict[str, Any]] = [{"params": [p for name, p in trained if not name.endswith(".latent")], "lr": rate}]
        return groups + ([{"params": latents, "lr": code_rate, "eps": LATENT_EPSILON}] if latents else [])

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        """Every trained tensor as it is stored, by plain name (`NAME.weight_packed`, `NORM.weight`, ...), on the CPU."""
        found: dict[str, Tensor] = {}
        for name in self.linears:
            linear = self.network.get_submodule(name)
            assert isinstance(linear, GridLinear)
            found |= {f"{name}.{leaf}": tensor for leaf, tensor in linear.stored().items()}
        for name, dtype in self.vectors.items():
            owner, leaf = _owner(self.network, name)
            found[name] = getattr(owner, leaf).to(dtype).cpu()
        return found


def _owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return network.get_submodule(path), leaf


def _grid_linear(network: nn.Module, model: Model, start: Tensor | None, name: str) -> GridLinear:
    """`start`: the weight (out, in) at which the latent starts; None trains no codes."""
    assert isinstance(model.format, PackQuantized)
    plain: Any = network.get_submodule(name)
    stored = model.stored_name(name)
    codes, zero_point, scale = model.format.read_codes(stored)
    scheme, device = model.format.scheme(stored), plain.weight.device
    latent = codes if start is None else start_latent(codes, zero_point, scale, scheme, start)
    return GridLinear(latent.to(device), zero_point.to(device), scale.to(device), scheme, plain.bias)


def start_latent(codes: Tensor, zero_point: Tensor, scale: Tensor, scheme: Scheme, original: Tensor) -> Tensor:
    """V at the start: the original weight on the grid, moved into the cell of its stored code.

    codes and original (out, in); zero_point and scale (out, groups). An original of another shape (pruned since) tells nothing,
    and V is the code.

    Returns:
        (out, in) float32.
    """
    codes = codes.float()
    if original.shape != codes.shape:
        return codes
    step = scale.float().masked_fill(scale == 0, 1).unsqueeze(-1)
    position = (grouped(original.float(), scheme) / step + zero_point.float().unsqueeze(-1)).flatten(1)
    return position.clamp(codes - INSIDE, codes + INSIDE)
