"""Train one block for ApiQ: starting point, training loop, and choice of the result. Symbols as in method.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.errors import naming
from compresskit.machine.precision import matrix_products
from compresskit.numerics.grid import min_max_grid
from compresskit.numerics.lowrank import Metric
from compresskit.numerics.packed import QuantizedLinear, Storage
from compresskit.numerics.token_errors import SMALLEST_ENERGY, token_errors, usual_energy
from compresskit.quantization.apiq.dealing import add_gradients, owners_of, turns
from compresskit.quantization.apiq.linear import TrainedLinear
from compresskit.quantization.apiq.settings import ApiQSettings
from compresskit.quantization.error_feedback import feedback, round_with_feedback
from compresskit.quantization.expert_floor import ExpertFloor
from compresskit.walk.block import Block
from compresskit.walk.sequence import collected, replace_weight

T = TypeVar("T")
BETAS = (0.9, 0.95)
"""AdamW's betas; with only 100 to 200 steps the second moments must adapt faster than by default."""
SMALLEST_GRADIENT = 1e-12
"""AdamW's eps; the gradients of millions of offsets of an error that starts at 1 are far below the default."""


class Trainer:
    """The linears of one block in training, the block's inputs and its target outputs."""

    def __init__(
        self,
        method: ApiQSettings,
        block: Block,
        targets: list[Tensor],
        storage: Storage,
        saliencies: Mapping[str, Tensor],
    ):
        """`targets`: the original block's outputs, (batch, length, hidden) per micro-batch. `saliencies`: Fisher diagonals."""
        self.method, self.block, self.targets = method, block, targets
        self.storage = storage
        self.saliencies = saliencies
        self.linears: dict[str, TrainedLinear] = {}
        self.floor = ExpertFloor(block)
        trained = storage.vectors if method.norm_rate else {}
        self.start_vectors = {name: block.module.get_parameter(name).detach().float().clone() for name in trained}
        self.shifts = {name: torch.zeros_like(vector) for name, vector in self.start_vectors.items()}
        channels = saliencies.get(block.name) if method.output_weights == "fisher" else None
        # A mean of 0: no loss depends on the block.
        self.channels = channels / channels.mean() if channels is not None and float(channels.mean()) > 0 else None
        self.usual_energy = usual_energy(targets, self.channels)
        self.outputs: list[Tensor] = []
        self.owners: dict[str, int] = {}
        """The rank that trains each linear, norm and bias."""

    @torch.no_grad()
    def start(self, sequence: Sequence[Sequence[tuple[str, ...]]]) -> None:
        """Compute the starting point, position by position on the quantised prefix, like `quantize_block` of the shared walk."""
        for number, groups in enumerate(sequence):
            with self.floor.watching(groups):
                grams = collected(list(groups), self.block, number >= self.block.mixer_positions)
            self.floor.fill(grams)
            for group in groups:
                gram = grams.pop(group[0])
                # In place: for 8,192 inputs a second matrix takes a quarter of a gigabyte.
                self._start_group(group, gram.matrix().div_(max(1, gram.tokens)), gram.tokens)

    def _start_group(self, group: tuple[str, ...], hessian: Tensor, tokens: int) -> None:
        weights = [self.block.linear(name).weight.detach().float() for name in group]
        rows = torch.cat(weights)
        targets, storage = rows, self.storage.of(group[0])
        if self.method.start == "gptq" and tokens:
            scheme = storage.scheme
            grid = min_max_grid(rows, scheme, storage.scale_dtype)
            targets = round_with_feedback(rows, feedback(hessian, self.method.damping, ordered=True), grid, scheme).targets
        metric = Metric(hessian, self.method.damping) if self.storage.rank and tokens else None
        for name, weight, target in zip(group, weights, torch.split(targets, [len(w) for w in weights]), strict=True):
            linear = TrainedLinear.of(weight, target.clone(), storage)
            if self.storage.rank:
                with naming(name):
                    linear.start_with_adapter(weight, metric)
            if self._has_saliency_term:
                linear.original, linear.saliency = weight, self._saliency(name, hessian)
            self.linears[name] = linear
            replace_weight(self.block.linear(name), linear.stored().weight)

    @property
    def _has_saliency_term(self) -> bool:
        """Whether the saliency term is part of the loss."""
        return self.method.saliency != "none" and self.method.saliency_weight > 0

    def _saliency(self, name: str, hessian: Tensor) -> Tensor | None:
        found = hessian.diagonal().clone() if self.method.saliency == "activation" else self.saliencies[name]
        mean = found.mean()
        return found / mean if mean > 0 else None

    def train(self, start_error: float) -> None:
        """Train V, g, A, B, norms and biases with AdamW; all rates fall linearly to 0."""
        steps = self.method.epochs * len(self.targets) // self._batches_a_step()
        if steps == 0 or start_error == 0:
            return
        self.owners = owners_of(
            {name: each.target.numel() for name, each in self.linears.items()}
            | {name: each.numel() for name, each in self.shifts.items()}
        )
        groups = self._parameters(steps)
        for parameter in itertools.chain(self.shifts.values(), *(group["params"] for group in groups)):
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(groups or [{"params": []}], betas=BETAS, eps=SMALLEST_GRADIENT, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        distances = self._distances()
        for chosen in self._order(steps):
            self._gradients(chosen, start_error, distances)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for linear in self._own(self.linears).values():
                    linear.offset.clamp_(-0.5, 0.5)
        for parameter in itertools.chain(self.shifts.values(), *(group["params"] for group in groups)):
            parameter.requires_grad_(False)
        for name, linear in self.linears.items():
            for parameter in (linear.offset, linear.low_clipping, linear.high_clipping, *(linear.adapter or ())):
                distributed.send(parameter, self.owners[name])
        for name, shift in self.shifts.items():
            distributed.send(shift, self.owners[name])

    def _own(self, among: Mapping[str, T]) -> dict[str, T]:
        """What this rank trains."""
        return {name: each for name, each in among.items() if self.owners[name] == distributed.rank()}

    def _parameters(self, steps: int) -> list[dict[str, Any]]:
        """This rank's groups with their initial rates: to move a distance of 1 in `steps` steps takes 2 / steps, falling to 0."""
        linears, shifts = self._own(self.linears).values(), self._own(self.shifts).values()
        groups = [
            (self.method.clipping_rate * 2 / steps, [c for each in linears for c in (each.low_clipping, each.high_clipping)]),
            (self.method.learning_rate, [factor for each in linears for factor in each.adapter or ()]),
        ]
        if self.method.rounding == "learned":
            groups.append((self.method.rounding_rate / steps, [each.offset for each in linears]))
        groups.append((self.method.norm_rate * 2 / steps, list(shifts)))
        return [{"params": parameters, "lr": rate} for rate, parameters in groups if parameters]

    def _batches_a_step(self) -> int:
        size = self.targets[0].shape[0]
        return max(1, min(len(self.targets), round(self.method.batch / size)))

    def _order(self, steps: int) -> Iterator[list[int]]:
        """Micro-batches of every step: all in a random order, then again."""
        generator = torch.Generator().manual_seed(self.block.index)
        waiting: list[int] = []
        for _ in range(steps):
            if len(waiting) < self._batches_a_step():
                waiting += torch.randperm(len(self.targets), generator=generator).tolist()
            chosen, waiting = waiting[: self._batches_a_step()], waiting[self._batches_a_step() :]
            yield chosen

    def _distances(self) -> dict[str, float]:
        """Saliency terms at the start, by linear; empty without saliency."""
        if not self._has_saliency_term:
            return {}
        with torch.no_grad():
            found = {name: float(linear.distance(self._held(linear.weights()))) for name, linear in self.linears.items()}
        return {name: value for name, value in found.items() if value > 0}

    def _held(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """The weight that the regulariser keeps near the original, from those (without, with) the low-rank pair."""
        return pair[self.method.regularize == "after-lora"]

    def _gradients(self, chosen: list[int], start_error: float, distances: dict[str, float]) -> None:
        """Add the gradient of equation 1 over these micro-batches to the parameters' gradients.

        The block runs on its own detached weights. Their gradient goes through equations 2 and 3 once, not once per micro-batch,
        one linear after the other, so that autograd keeps the intermediates of only one linear.
        """
        weights = {name: self.block.linear(name).weight for name in self.linears}
        shares = {name: self.method.saliency_weight / len(distances) / value for name, value in distances.items()}
        with torch.no_grad():
            for name, linear in self._own(self.linears).items():
                weights[name].copy_(linear.weights()[1])
            for name, tensor in (weights | self.shifts).items():
                distributed.send(tensor.detach(), self.owners[name])
        for weight in weights.values():
            weight.requires_grad_(True)
        sums: dict[str, Tensor] = {}
        for turn in turns(chosen):
            if distributed.rank() < len(turn):
                self._backpropagate(turn[distributed.rank()], start_error * len(chosen))
            add_gradients(weights | self.shifts, self.owners, len(turn), sums)
        for name, shift in self.shifts.items():
            shift.grad = sums.get(name)
        for weight in weights.values():
            weight.requires_grad_(False).grad = None
        for name, linear in self._own(self.linears).items():
            self._pass_on(linear, sums.pop(name, None), shares.get(name))

    def _backpropagate(self, index: int, parts: float) -> None:
        """Add the gradients of a micro-batch's error, divided by `parts`, to those of the block's weights and shifts."""
        vectors = {name: vector.to(self.block.hidden[index]) for name, vector in self.vectors.items()}
        with matrix_products(self.block.hidden[index].device, self.method.precision):
            output = self.block.run_with(self.block.hidden[index], index, vectors)
        torch.autograd.backward(self.micro_batch_error(output, index) / parts)

    def _pass_on(self, linear: TrainedLinear, gradient: Tensor | None, share: float | None) -> None:
        """Pass the gradient of a linear's weight, and that of its saliency term of this share, on to its parameters."""
        pair = linear.weights()
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        if gradient is not None:  # None for an expert that no token reached
            roots.append(pair[1])
            gradients.append(gradient.to(pair[1]))
        if share is not None:
            roots.append(linear.distance(self._held(pair)) * share)
            gradients.append(None)
        if roots:
            torch.autograd.backward(roots, gradients)

    @torch.no_grad()
    def block_error(self) -> float:
        """Error of the block's current state over all windows."""
        return self._mean_error((number, self.block.run(self.block.hidden[number], number)) for number in self.block.own)

    def _mean_error(self, outputs: Iterable[tuple[int, Tensor]]) -> float:
        """Mean over all micro-batches of the error; this rank has the numbers and outputs of its own."""
        own = [float(self.micro_batch_error(output, number)) for number, output in outputs]
        errors = distributed.in_order(own, len(self.block.hidden))
        return sum(errors) / len(errors)

    def micro_batch_error(self, output: Tensor, index: int) -> Tensor:
        """Mean of e_t (equation 1, or its variant by `error`) over the tokens of a micro-batch; a number."""
        least = {"absolute": None, "relative": SMALLEST_ENERGY, "capped": self.usual_energy}[self.method.error]
        return token_errors(output, self.targets[index], self.channels, least).mean()

    @torch.no_grad()
    def settle(self) -> float:
        """Set the block to the weights as stored, run it and return the error. Its inputs are kept."""
        for name, linear in self.linears.items():
            replace_weight(self.block.linear(name), linear.stored().weight)
        for name, vector in self._stored_vectors().items():
            self.block.module.get_parameter(name).copy_(vector)
        self.outputs = self.block.run_all(self.block.hidden)
        return self._mean_error((number, self.outputs[number]) for number in self.block.own)

    def reset(self) -> None:
        """Reset everything to the starting point."""
        for linear in self.linears.values():
            linear.reset()
        for shift in self.shifts.values():
            shift.zero_()

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Norms and biases as trained. Each value moves in units of its own size: in one norm they differ a thousandfold."""
        return {name: start + start.abs() * self.shifts[name] for name, start in self.start_vectors.items()}

    def _stored_vectors(self) -> dict[str, Tensor]:
        return {name: vector.to(self.storage.vectors[name]) for name, vector in self.vectors.items()}

    @torch.no_grad()
    def stored(self) -> tuple[dict[str, QuantizedLinear], dict[str, Tensor]]:
        """Return the linears, and the norms and biases, to write."""
        return {name: linear.stored() for name, linear in self.linears.items()}, self._stored_vectors()
