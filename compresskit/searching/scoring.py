"""Score every option of every unit by what its rounding changes in the original's predictions, and keep its codes.

    c(u, o) = 1/2 mean over tokens of sum_j g_tj^2 dz_tj^2,    dz_t = (W_o - W) x_t                       (1)
    g_tj    = d log p(y) / d z_tj,    y drawn from p                                                      (2)

symbol  meaning                                               shape           name here
W, W_o  a linear's weights, and rounded by option o           (out, in)       weight, rounded
x       its inputs                                            (tokens, in)    inputs
g       gradients of the drawn tokens at its outputs z        (tokens, out)   gradients

Equation 1 is the KL divergence of the predictions to second order, with the errors of different outputs, linears and tokens
uncorrelated (compensation/output_fisher.py has the expansion). Gradient and error of a token are multiplied before the mean:
where a model makes massive activations, at the first token, both are large together (docs/evidence/search.md). One
backward walk over the original gives all of it: a block that runs with gradients shows its inputs and the gradients of its
outputs, and is then rounded once for every option. The codes stay in files, which the trials map (trials.py). The rounding is
the method's own, on the original's inputs: for `rtn` what `quantize` stores to the bit, for `gptq` without the quantised prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from compresskit.calibration.drawn_labels import drawn_loss
from compresskit.checkpoint.whole_files import write_whole_tensors
from compresskit.numerics.grid import Grid, from_codes, to_codes
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.error_feedback import feedback, round_with_feedback
from compresskit.quantization.formatted import FormatMethod
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.rtn import RTN
from compresskit.searching.candidates import Unit
from compresskit.walk.backward import GradientStep, through, walk_backward
from compresskit.walk.block import Block
from compresskit.walk.hooks import recorded_gradients, recorded_inputs
from compresskit.walk.sequence import OnBlock
from compresskit.walk.statistics import Gram
from compresskit.walk.walk import Walk

SEED = 0
"""Of the tokens that are drawn from the predictions."""


@dataclass
class Seen:
    """What a unit showed of every window."""

    gram: Gram
    """Second moments of its inputs."""
    inputs: list[Tensor]
    """(tokens, in) each; its linears share them."""
    gradients: dict[str, list[Tensor]]
    """By linear (tokens, out) each."""

    def add(self, x: Tensor) -> None:
        """Add the inputs of one window, (tokens, in)."""
        self.gram.add(x)
        self.inputs.append(x)

    def cost(self, name: str, error: Tensor) -> float:
        """Equation 1 for an error of a linear's weights, (out, in)."""
        both = zip(self.inputs, self.gradients[name], strict=True)
        squares = sum(float((gradient.float() * (x.float() @ error.T)).square().sum(dtype=torch.float64)) for x, gradient in both)
        return squares / 2 / max(1, self.gram.tokens)


def score(
    walk: Walk,
    units: Sequence[Unit],
    method: FormatMethod,
    scale_dtype: torch.dtype,
    folders: tuple[Path, Path],
    on_block: OnBlock,
) -> list[list[float]]:
    """Compute equation 1 in nats a token for every option of every unit. `walk`: of the original, one window a micro-batch.

    `folders`: for the inputs of the blocks during the walk, and for the codes of every option (`codes_file`).

    Returns:
        The costs by unit and option.

    Raises:
        NumericalError: activations are not finite.
    """
    costs: dict[str, list[float]] = {}

    @contextmanager
    def visit(block: Block) -> Iterator[GradientStep]:
        own = [unit for unit in units if unit.block == block.index]
        seen = {unit.name: _nothing_seen(block, unit, walk.device) for unit in own}
        with ExitStack() as stack:
            for unit in own:
                stack.enter_context(recorded_inputs(block.linear(unit.linears[0]), seen[unit.name].add, stop=False))
                for name, found in seen[unit.name].gradients.items():
                    stack.enter_context(recorded_gradients(block.linear(name), found.append))
            yield through(block)
        kept: dict[str, Tensor] = {}
        for unit in own:
            costs[unit.name] = _score_unit(block, unit, method, scale_dtype, seen.pop(unit.name), kept)
        write_whole_tensors(codes_file(folders[1], block.index), kept)

    drawn = drawn_loss(repeat(torch.Generator().manual_seed(SEED)))
    walk_backward(walk, folders[0], on_block, drawn, visit)
    return [costs[unit.name] for unit in units]


def _nothing_seen(block: Block, unit: Unit, device: torch.device) -> Seen:
    return Seen(Gram(block.linear(unit.linears[0]).in_features, device), [], {name: [] for name in unit.linears})


@torch.no_grad()
def _score_unit(
    block: Block,
    unit: Unit,
    method: FormatMethod,
    scale_dtype: torch.dtype,
    seen: Seen,
    kept: dict[str, Tensor],
) -> list[float]:
    """Round a unit by each of its options, and add the codes to `kept`; its costs in nats a token."""
    weights = [block.linear(name).weight.detach().float() for name in unit.linears]
    hessian = seen.gram.matrix().div_(max(1, seen.gram.tokens))
    found = []
    for option, codes_and_grids in enumerate(rounded(method, weights, hessian, unit.schemes, scale_dtype)):
        cost = 0.0
        for name, weight, (codes, grid) in zip(unit.linears, weights, codes_and_grids, strict=True):
            cost += seen.cost(name, from_codes(codes, grid, unit.schemes[option]) - weight)
            kept[f"{name}|{option}.codes"] = codes.to(torch.int8)
            kept[f"{name}|{option}.scale"] = grid.scale.to(scale_dtype)
        found.append(cost)
    return found


def rounded(
    method: FormatMethod, weights: Sequence[Tensor], hessian: Tensor, schemes: Sequence[Scheme], scale_dtype: torch.dtype
) -> Iterator[list[tuple[Tensor, Grid]]]:
    """Round the linears (out, in) of a unit as the method does, for one scheme after the other.

    Yields:
        Codes (out, in) float32 and the grid of each linear.
    """
    if not isinstance(method, GPTQ) or not bool(hessian.any()):
        equal = isinstance(method, RTN) and method.clipping == "error"
        for scheme in schemes:
            grids = method.grids(weights, scheme, scale_dtype, weights[0].new_ones(weights[0].shape[1]) if equal else None)
            yield [(to_codes(weight, grid, scheme), grid) for weight, grid in zip(weights, grids, strict=True)]
        return
    passed = feedback(hessian, method.damping, method.act_order)
    rows, lengths = torch.cat(list(weights)), [len(weight) for weight in weights]
    for scheme in schemes:
        grids = method.grids(weights, scheme, scale_dtype, hessian.diagonal() if method.clipping == "error" else None)
        whole = Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero_point for grid in grids]))
        codes = round_with_feedback(rows, passed, whole, scheme).codes
        yield list(zip(torch.split(codes, lengths), grids, strict=True))


def codes_file(folder: Path, block: int) -> Path:
    """The file of a block: of each linear and option `NAME|OPTION.codes` (out, in) int8 and `.scale` (out, groups)."""
    return folder / f"options-{block}.safetensors"
