"""Adapters whose factors start from the base's own weights (PiSSA, OLoRA), as the plain LoRA adapters that do the same.

peft computes the starting pair again from the base when it loads such an adapter, and takes it out of the weight:

    W + update = (W - s B_0 A_0) + s B A = W + s [B, -B_0] [A; A_0]                                                 (1)

    pissa (arXiv 2404.02948)    s B_0 A_0 = U_r S_r V_r^T = U_r U_r^T W        the r largest singular values of W      (2)
    olora (arXiv 2406.01775)    B_0 = Q_r,  A_0 = R_r = Q_r^T W                the first r columns of W = Q R        (3)

symbol     meaning                                   shape               name here
W          weight of the base                        (out, in)           weight
A, B       stored factors                            (r, in), (out, r)   first, second
A_0, B_0   pair that peft starts from                (r, in), (out, r)
s          scaling (formats/peft.py)                 ()                  scaling
U_r, Q_r   orthonormal columns                       (out, r)            basis

Equation 1 is also how peft converts such an adapter to plain LoRA. peft rounds W - s B_0 A_0 to the dtype of W; here nothing is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.errors import RequestError
from compresskit.formats.adapter_kinds import CONVERT, PISSA, base_change
from compresskit.formats.peft import CONFIG, USUAL_RANK, Adapter, factor_names
from compresskit.models.model import Model

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("F32", "F16", "BF16")
"""Dtypes of weights from which peft starts factors."""


@dataclass(frozen=True)
class PlainFactors(Checkpoint):
    """The tensors of an adapter with the factors of equation 1; they are computed on reading."""

    adapter: Adapter = field(kw_only=True)
    model: Model = field(kw_only=True)
    change: str = field(kw_only=True)
    """PISSA or OLORA."""
    linears: dict[str, str] = field(kw_only=True)
    """Module name by the name of a factor."""
    pair: dict[str, Tensor] = field(default_factory=dict, kw_only=True, compare=False)
    """The two factors of the linear that was read last."""

    @property
    def parameters(self) -> int:
        """Number of values in the file."""
        return self.adapter.store.parameters

    @property
    def stored_bytes(self) -> int:
        """Size of the tensors in the file."""
        return self.adapter.store.stored_bytes

    def read(self, name: str) -> Tensor:
        """Read one tensor; the factors of a linear are float32, of twice the rank."""
        if name not in self.linears:
            return self.adapter.store.read(name)
        if name not in self.pair:
            linear = self.linears[name]
            self.pair.clear()
            self.pair.update(zip(factor_names(linear), self._factors(linear), strict=True))
        return self.pair[name]

    def _factors(self, linear: str) -> tuple[Tensor, Tensor]:
        import torch

        from compresskit.models.meta import read_plain

        first, second = (self.adapter.store.read(each).float() for each in factor_names(linear))
        weight = read_plain(replace(self.model, adapter=None), f"{linear}.weight").float()
        basis = starting_basis(self.change, weight, len(first))
        taken = basis / self.adapter.scaling(linear) if self.change == PISSA else basis
        stated = 2**0.5 if self.config.get("use_rslora") else 2  # twice the rank halves the scaling that the file states
        return torch.cat([first, basis.T @ weight]), stated * torch.cat([second, -taken], dim=1)


def starting_basis(change: str, weight: Tensor, rank: int) -> Tensor:
    """U_r of equation 2, or Q_r of equation 3: weight (out, in) -> (out, rank) float32."""
    import torch

    exact = weight.double()
    if change != PISSA:
        basis: Tensor = torch.linalg.qr(exact[:, :rank]).Q
    elif exact.shape[0] <= exact.shape[1]:  # second moments of the smaller side: several times as fast as a decomposition
        basis = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
    else:
        right = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -rank:]
        basis = torch.linalg.qr(exact @ right).Q
    return basis.float()


def as_plain(adapter: Adapter, model: Model, linears: Sequence[str]) -> Adapter:
    """The plain LoRA adapter that changes the model as stock peft changes it when it loads this one.

    `linears` are those that the adapter updates; they are linears of the model.

    Returns:
        The adapter itself if loading it leaves the base as it is; else one of twice the rank. No weights are read.

    Raises:
        RequestError: what loading changes cannot be computed from this base.
    """
    path = adapter.folder / CONFIG
    change = base_change(path, adapter.config)
    if not change:
        return adapter
    for name in linears:
        _check(adapter, model, name, change)
    store = _store(adapter, model, change, linears)
    return Adapter(adapter.folder, store.config, store)


def _check(adapter: Adapter, model: Model, name: str, change: str) -> None:
    path, scaling, rank = adapter.folder / CONFIG, adapter.scaling(name), adapter.rank(name)
    if rank > min(model.linear_shape(name)):
        shape = list(model.linear_shape(name))
        raise RequestError(f"{path}: r of {name} is {rank}, but {change} finds no such rank in a weight of {shape}; {CONVERT}")
    if change == PISSA and scaling <= 0:
        what = f"the scaling of {name} is {scaling:g}, from which {change} starts no factors"
        raise RequestError(f"{path}: {what}; restore the file")
    weight = model.checkpoint.tensors.get(model.stored_name(f"{name}.weight"))
    if model.quantized or weight is None or weight.dtype not in DTYPES:
        what = f"{change} starts from the weights of {model.checkpoint.folder}, where {name} is not stored in 16 or 32 bits"
        raise RequestError(f"{path}: {what}; {CONVERT}")
    if change != PISSA and model.architecture.transposed:
        raise RequestError(f"{path}: {change} of {model.family}'s transposed weights is not read here; {CONVERT}")


def _store(adapter: Adapter, model: Model, change: str, linears: Sequence[str]) -> PlainFactors:
    held = adapter.store
    names = {factor: name for name in linears for factor in factor_names(name)}
    tensors = {name: _twice(spec) if name in names else spec for name, spec in held.tensors.items()}
    return PlainFactors(
        held.folder, _of_twice_the_rank(adapter.config), tensors, held.file_of, held.manifest,
        adapter=adapter, model=model, change=change, linears=names,
    )  # fmt: skip


def _twice(spec: TensorSpec) -> TensorSpec:
    """A factor of twice the rank."""
    rows, columns = spec.shape
    shape = (2 * rows, columns) if ".lora_A." in spec.name else (rows, 2 * columns)
    return TensorSpec(spec.name, "F32", shape)


def _of_twice_the_rank(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of plain factors of twice the rank; the scalings that follow from it are corrected in B."""
    patterns = config.get("rank_pattern") or {}
    # A rank that no linear has was not checked, and may be anything.
    ranks = {key: 2 * value for key, value in patterns.items() if type(value) is int}
    usual = config.get("r", USUAL_RANK)
    return config | {"init_lora_weights": True, "r": 2 * usual if type(usual) is int else usual, "rank_pattern": ranks}
