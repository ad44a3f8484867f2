"""Request of `search`: checks without weights, the candidates and their exact bytes, planned output and cost."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint import source
from compresskit.checkpoint.outputs import Outputs
from compresskit.errors import RequestError
from compresskit.job import HELD_BACK, TEXT_SETTINGS, Request, where_used
from compresskit.machine.device import Where
from compresskit.methods import method_class
from compresskit.models.load import open_model
from compresskit.models.loadable import largest_group, quantised_linears
from compresskit.models.model import Model
from compresskit.numerics.scheme import Scheme
from compresskit.numerics.units import readable_bytes
from compresskit.quantization.formatted import FormatMethod
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.method import GridMethod
from compresskit.quantization.request import QuantizeRequest
from compresskit.searching.candidates import Unit, candidates, stored_bytes
from compresskit.searching.knapsack import Assignment, best_within, front, total
from compresskit.searching.options import SearchOptions, numbers, target_bytes
from compresskit.walk.cost import FLOAT32_BYTES, block_bytes, edit_bytes, embedding_bytes, head_share, hidden_bytes, walk_bytes

SIXTEEN_BIT_BYTES = 2
HEADER_BYTES = 8
"""By which a tensor's entry in the header of a file may grow with its offsets."""
BACKWARD_PASSES = 4
"""A forward walk, and a backward walk that runs the blocks again, with twice a forward pass's work for the gradients."""
TOGETHER = 16
"""Trials that share one walk."""
RANDOM = 64
"""Random assignments of equal bytes that are always measured (random-search baseline, arXiv 2403.08265)."""
FRONT_POINTS = 20
"""Points of the front that are measured."""
CODE_BYTES = 1.07
"""Of a weight under one option, as `score` keeps it: its code in a byte, and the scales."""


@dataclass(frozen=True)
class SearchRequest(Request):
    """A request to choose a grid for every unit."""

    method: Any
    """None: the quantizer is an option."""
    options: SearchOptions
    source_name: str = ""
    """SOURCE as it was given, for the recipe."""
    stage: ClassVar[str] = "search"

    def check(self) -> None:
        """Refuse targets that are none or that no choice meets, and models that `quantize` could not store so.

        Raises:
            RequestError: not one target, a target out of reach, no candidates, or what `quantize` refuses.
            UnsupportedArchitecture: stock tools could not load the result.
        """
        options = self.options
        given = [name for name in ("bytes", "bits", "max_loss") if getattr(options, name) is not None]
        if len(given) != 1:
            named = " ".join(f"--{name.replace('_', '-')}" for name in given) or "no target"
            raise RequestError(f"{named}: give one of --bytes 0.35, --bits 2.5 and --max-loss 0.1")
        if options.quantizer == "apiq" and options.clipping == "none":
            raise RequestError("--method apiq --clipping none: apiq trains its ranges; leave --clipping out")
        if options.quick_windows > options.verify_windows:
            asked = f"--quick-windows {options.quick_windows}"
            raise RequestError(f"{asked}: more than --verify-windows {options.verify_windows}, of which they are the first")
        self.quantize_request(None).check()
        if all(len(unit.schemes) == 1 for unit in self.units):
            raise RequestError(
                f"--levels {options.levels} --group-sizes {options.group_sizes}: leave one choice, and nothing to search"
            )
        self.quantize_request(self.smallest).check()
        if self.budget is not None and self.smallest_bytes > self.budget:
            most, least = (readable_bytes(size + self.fixed_bytes) for size in (self.budget, self.smallest_bytes))
            asked = f"--bytes {options.bytes}" if options.bytes is not None else f"--bits {options.bits:g}"
            halved = options.bytes is not None and self.model.weight_dtype == "F32" and not options.embedding_bits
            remedy = f"raise it, or allow fewer bits{', or --embedding-bits 16' if halved else ''}"
            raise RequestError(f"{asked}: {most}; the smallest choice takes {least}; {remedy}")

    @cached_property
    def levels(self) -> list[int]:
        """Bits that a unit may have."""
        return numbers("--levels", self.options.levels, 2, 8)

    @cached_property
    def groups(self) -> list[int]:
        """Group sizes that a unit may have."""
        return numbers("--group-sizes", self.options.group_sizes, 1, 1 << 20)

    @cached_property
    def units(self) -> list[Unit]:
        """The units and their options."""
        names = quantised_linears(self.model, self.options.ignore)
        return candidates(self.model, names, self.levels, self.groups, self.scale_dtype)

    @property
    def scale_dtype(self) -> str:
        """Of the stored scales, as safetensors names it."""
        return self.quantize_request(None).scale_dtype

    @cached_property
    def sizes(self) -> list[tuple[int, ...]]:
        """Bytes by unit and option."""
        return [unit.sizes for unit in self.units]

    @property
    def kinds(self) -> list[list[tuple[str, int]]]:
        """By unit and option: the unit's place in its block, and the option's bits."""
        return [[(unit.name.partition(".")[2], scheme.bits) for scheme in unit.schemes] for unit in self.units]

    @property
    def smallest(self) -> Assignment:
        """The fewest bytes that there are."""
        return (0,) * len(self.units)

    @property
    def smallest_bytes(self) -> int:
        """Bytes of its linears."""
        return int(total(self.sizes, self.smallest))

    def bits_by(self, assignment: Assignment) -> dict[str, dict[str, int]]:
        """Bits and group sizes by unit, as `quantize --bits-by` takes them."""
        schemes = {unit.name: unit.schemes[option] for unit, option in zip(self.units, assignment, strict=True)}
        return {name: {"bits": scheme.bits, "group_size": scheme.group_size} for name, scheme in schemes.items()}

    def method_settings(self, assignment: Assignment | None) -> dict[str, Any]:
        """Settings of the quantizer; None: without grids by unit."""
        options = self.options
        own = {"rank": 0} if options.quantizer == "apiq" else {"clipping": options.clipping}
        shared = options.model_dump(include={"ignore", "embedding_bits"}, exclude_defaults=True)
        grids = {} if assignment is None else {"bits_by": self.bits_by(assignment)}
        return {"symmetric": True, **own, **shared, **grids}

    def rounding(self, assignment: Assignment | None) -> GridMethod:
        """The quantizer with its settings."""
        found: GridMethod = method_class("quantize", self.options.quantizer)(**self.method_settings(assignment))
        return found

    @property
    def trial_rounding(self) -> FormatMethod:
        """What rounds the candidates: the quantizer, or for apiq its starting point."""
        method = self.rounding(None)
        return method if isinstance(method, FormatMethod) else GPTQ(symmetric=True)

    def quantize_request(self, assignment: Assignment | None) -> QuantizeRequest:
        """The request that stores the model with these options; None: with one grid for all, to ask what no grid decides."""
        return QuantizeRequest(self.rounding(assignment), self.model, self.out, self.options)

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of the weight files besides the units' tensors, the headers at their longest."""
        outputs = self.quantize_request(self.smallest).outputs()
        return outputs.bytes(self.options.shard_bytes) - self.smallest_bytes + HEADER_BYTES * len(outputs.specs)

    @cached_property
    def budget(self) -> int | None:
        """Bytes for the tensors of the units; None where the loss is the target."""
        options, model = self.options, self.model
        if options.bits is not None:
            lower, upper = (self._bytes_of(bits) for bits in (math.floor(options.bits), math.ceil(options.bits)))
            return int(lower + (options.bits - math.floor(options.bits)) * (upper - lower))
        if options.bytes is not None:
            return target_bytes(options.bytes, SIXTEEN_BIT_BYTES * model.parameters) - self.fixed_bytes
        return None

    def _bytes_of(self, bits: int) -> int:
        """Bytes of the units' tensors as `quantize` stores them with this number of bits and its default groups."""
        scheme = Scheme(bits, largest_group(self.model, self.options.ignore), True)
        return sum(stored_bytes(self.model, unit.linears, scheme, self.scale_dtype) for unit in self.units)

    @cached_property
    def planned(self) -> Assignment:
        """A choice of as many bytes as the result's: by the variance of rounding alone; the most bytes for a loss."""
        costs = [[unit.weights * 4.0**-scheme.bits for scheme in unit.schemes] for unit in self.units]
        if self.budget is None:
            return front(costs, self.sizes)[-1]
        return best_within(costs, self.sizes, self.budget) or self.smallest

    @property
    def text(self) -> TextRequest:
        """Calibration text, then the windows of the trials, then those of the report."""
        options = self.options
        count = options.samples + options.verify_windows + HELD_BACK
        return TextRequest(options.calibration, count, options.sequence_length, options.seed, HELD_BACK)

    @property
    def name(self) -> str:
        """The quantizer."""
        return self.options.quantizer

    def settings(self, where: Where) -> dict[str, Any]:
        """Settings that determine the result, besides the models and the text."""
        shared = self.options.model_dump(include=set(TEXT_SETTINGS) | (SearchOptions.model_fields.keys() - UNDECIDING))
        return {"method": self.name, **shared, **where_used(where)}

    def outputs(self) -> Outputs:
        """The checkpoint's files, for a choice of as many bytes as the result's; none with `--no-run`."""
        return self.quantize_request(self.planned).outputs() if self.options.run else Outputs()

    def result_model(self) -> Model:
        """The low-bit model; the source's shapes with `--no-run`."""
        return self.quantize_request(self.planned).result_model() if self.options.run else self.model

    @property
    def trial_windows(self) -> int:
        """Windows after which no more trials begin."""
        return int(self.options.passes * self.options.samples)

    @property
    def least_windows(self) -> int:
        """Windows of the trials that are run in any case."""
        return (FRONT_POINTS + RANDOM) * self.options.quick_windows

    def passes(self) -> float:
        """Forward passes of a window: the scores, the trials with their heads, and the quantizer's."""
        head = 1 + head_share(self.model)
        scored = BACKWARD_PASSES * min(self.options.score_windows, self.options.samples)
        stored = self.quantize_request(self.planned).passes() if self.options.run else self.sampling_passes
        return scored + max(self.trial_windows, self.least_windows) * head + stored

    def peak_bytes(self) -> int:
        """Peak bytes: of the scores, of the trials that run together, or of the quantizer."""
        model, length = self.model, self.options.sequence_length
        states = hidden_bytes(model, self.options.verify_windows * length)
        scored = walk_bytes(model, (self.options.score_windows, length), edit_bytes(model, True)) + 2 * block_bytes(model)
        scored += FLOAT32_BYTES * self.options.score_windows * length * self._widths
        scored += max(_codes_bytes(unit for unit in self.units if unit.block == index) for index in range(model.block_count))
        tried = walk_bytes(model, (self.options.verify_windows, length), 0) + TOGETHER * states + embedding_bytes(model)
        stored = self.quantize_request(self.planned).peak_bytes() if self.options.run else 0
        return max(scored, tried, stored)

    @property
    def _widths(self) -> int:
        """Inputs and outputs of all linears of a block, which the scores keep of every token."""
        return max(
            sum(sum(self.model.linear_shape(name)) for name in self.model.block_linears(index))
            for index in range(self.model.block_count)
        )

    @property
    def scratch_bytes(self) -> int:
        """Bytes on disk of the codes of all options and the inputs of the blocks."""
        inputs = hidden_bytes(self.model, self.options.score_windows * self.options.sequence_length) * self.model.block_count
        return super().scratch_bytes + _codes_bytes(self.units) + inputs


def _codes_bytes(units: Iterable[Unit]) -> int:
    """Bytes of the codes of all options of some units, which `score` writes block by block."""
    return sum(int(CODE_BYTES * unit.weights) * len(unit.schemes) for unit in units)


UNDECIDING = frozenset({"device", "dtype", "max_shard_size", "overwrite", "resume", "verify", "trust_remote_code", "explain"})
"""Options that do not decide the choice."""


def open_request(source_name: str, out: Path, options: SearchOptions) -> SearchRequest:
    """Open the source and refuse what cannot be done, before any weight is read.

    Returns:
        The request, all checks passed.

    Raises:
        CompresskitError: of the kinds in errors.py, what is wrong with the source, the text, OUT or a setting.
    """
    request = SearchRequest(None, open_model(source.resolve(source_name), options.trust_remote_code), out, options, source_name)
    request.check()
    request.check_text_and_out(sum(spec.bytes for spec in request.outputs().specs))
    return request
