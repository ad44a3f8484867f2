"""Request of `prune`: checks without weights, planned output and cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint import source
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.job import Request
from compresskit.models import layouts
from compresskit.models.layouts import Widths
from compresskit.models.load import open_model
from compresskit.models.model import Model
from compresskit.models.shapes import dense_shapes
from compresskit.pruning.method import PruneMethod
from compresskit.stages import Method, Options
from compresskit.walk.cost import edit_bytes, refit_bytes, walk_bytes

PASSES, PASSES_UNIFORM = 2.5, 1.9
"""Measured (docs/evidence/prune.md)."""
UNPRUNABLE = {"F8_E4M3", "F8_E5M2", "I8", "U8"}


@dataclass(frozen=True)
class PruningRequest(Request):
    """A request to remove something of a model: channels here, blocks in depth/, experts in experts/."""

    stage: ClassVar[str] = "prune"

    @property
    def estimated_bytes(self) -> int:
        """Size of the result's tensors."""
        return sum(spec.bytes for spec in self.outputs().specs)

    def check_dense(self) -> None:
        """Raise RequestError if the source is in low bits."""
        model, folder = self.model, self.model.checkpoint.folder
        if model.quantized:
            raise RequestError(f"{folder}: is quantized already; prune the dense checkpoint, then quantize the result")
        if found := model.checkpoint.dtypes & UNPRUNABLE:
            raise RequestError(f"{folder}: holds {', '.join(sorted(found))} tensors; prune a 16- or 32-bit checkpoint")


R = TypeVar("R", bound=PruningRequest)


def opened(kind: type[R], method: Method, source_name: str, out: Path, options: Options) -> R:
    """Open the source and refuse what cannot be done; invalid input is refused in under a second, before any weight is read.

    Returns:
        The request of this kind, all checks passed.

    Raises:
        CompresskitError: of the kinds in errors.py, what is wrong with the source, the text, OUT or a setting.
    """
    request = kind(method, open_model(source.resolve(source_name), options.trust_remote_code), out, options)
    request.check()
    request.check_text_and_out(request.estimated_bytes)
    return request


@dataclass(frozen=True)
class PruneRequest(PruningRequest):
    """A request to remove channels of a model."""

    method: PruneMethod

    @property
    def needs_text(self) -> bool:
        """Whether anything of the work looks at calibration text."""
        method = self.method
        return method.sparsity > 0 and (method.refit or method.needs_activations or method.allocation != "uniform")

    @property
    def text(self) -> TextRequest | None:
        """The calibration text, None where the scores and the refit need none."""
        options = self.options
        found = TextRequest(options.calibration, options.samples, options.sequence_length, options.seed)
        return found if self.needs_text else None

    @property
    def output_bias(self) -> bool:
        """Whether every block gets a corrected output bias: the method gives one, and the family has a place for it."""
        return self.method.adds_bias and self.needs_text and can_store_bias(self.model)

    def check(self) -> None:
        """Refuse what cannot be pruned.

        Raises:
            RequestError: the source is in low bits, or `--round-to` exceeds the widest network.
            UnsupportedArchitecture: the family cannot be stored with a width for each block.
        """
        self.check_dense()
        method, model, folder = self.method, self.model, self.model.checkpoint.folder
        groups = [group for index in range(model.block_count) for group in model.ffn_groups(index)]
        if not groups:
            raise UnsupportedArchitecture(
                f"{folder}: {model.family} has no feed-forward network whose channels can be removed; quantize it instead"
            )
        widest = max(group.width for group in groups)
        if method.round_to > widest:
            raise RequestError(f"--round-to {method.round_to}: the widest FFN has {widest} channels; choose less")
        if method.allocation != "uniform" and method.layout == "ragged" and method.sparsity > 0:
            layouts.check_ragged(model)
        elif method.sparsity > 0:
            layouts.check_keys(model)

    def outputs(self, widths: Widths | None = None) -> Outputs:
        """The checkpoint's files; `widths` None: those that are known before the text is seen (`_widths_beforehand`)."""
        if widths is None:
            widths = self._widths_beforehand()
        stored = layouts.stored_widths(self.model, widths, self.method.layout)
        config, files = layouts.configuration(self.model, stored)
        if self.output_bias and self.model.architecture.ffn_bias_key:
            config[self.model.architecture.ffn_bias_key] = True
        return Outputs(stored_tensors(self.model, stored, self.output_bias), config, files=files)

    def _widths_beforehand(self) -> Widths:
        """Widths of the right sum, alike in all blocks; all channels where the layout pads to the widest block."""
        if self.method.layout == "padded" and self.method.allocation != "uniform":  # one block may keep everything
            return [[group.width for group in self.model.ffn_groups(index)] for index in range(self.model.block_count)]
        from compresskit.pruning.allocation import even_widths

        return even_widths(self.method, self.model)

    def result_model(self) -> Model:
        """The pruned model, with even widths where the text decides."""
        return dense_shapes(self.model, self.outputs())

    def passes(self) -> float:
        """Forward passes of a window."""
        if not self.needs_text:
            return 0.0
        each = PASSES_UNIFORM if self.method.allocation == "uniform" else PASSES
        return self.sampling_passes + self.options.samples * each

    def peak_bytes(self) -> int:
        """Peak bytes of the walk."""
        windows = self.options.samples if self.needs_text else 0
        moments = self.method.refit or self.method.needs_covariance
        edited = refit_bytes(self.model) if moments else edit_bytes(self.model, False)
        return walk_bytes(self.model, (windows, self.options.sequence_length), edited)

    @property
    def estimated_bytes(self) -> int:
        """Size of the result when every block keeps its share; the whole source when the layout pads."""
        total = sum(spec.bytes for spec in self.model.checkpoint.tensors.values())
        if self.method.layout == "padded":
            return total
        ffn_bytes = 0.0
        for index in range(self.model.block_count):
            for group in self.model.ffn_groups(index):
                for ffn in group.members:
                    for name in (*ffn.in_projections, ffn.out_projection):
                        ffn_bytes += self._bytes(name)
        return int(total - self.method.sparsity * ffn_bytes)

    def _bytes(self, name: str) -> float:
        """Stored bytes of a linear's weight."""
        model, part = self.model, self.model.packed(f"{name}.weight")
        if part is None:
            return model.checkpoint.spec(model.stored_name(f"{name}.weight")).bytes
        whole = model.checkpoint.spec(part.stored)
        return whole.bytes / whole.shape[0] / part.parts


def open_request(method: PruneMethod, source_name: str, out: Path, options: Options) -> PruneRequest:
    """Open and check a request to remove channels; see `opened`."""
    return opened(PruneRequest, method, source_name, out, options)


def can_store_bias(model: Model) -> bool:
    """Whether the stock architecture has an FFN output bias: stored already, or switched on by a configuration key."""
    if model.architecture.ffn_bias_key:
        return True
    outputs = [ffn.out_projection for i in range(model.block_count) for group in model.ffn_groups(i) for ffn in group.members]
    return model.has(f"{outputs[0]}.bias") if not model.architecture.derived else all(model.has(f"{n}.bias") for n in outputs)


def stored_tensors(model: Model, widths: Widths, bias: bool) -> list[TensorSpec]:
    """Every tensor of the result with its stored shape, in the source's order; `bias` adds the missing biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    added: dict[str, TensorSpec] = {}
    for index, block in enumerate(widths):
        for group, width in zip(model.ffn_groups(index), block, strict=True):
            for ffn in group.members:
                for name in (*ffn.in_projections, ffn.out_projection):
                    is_output = name == ffn.out_projection
                    rows, columns = model.linear_shape(name)
                    rows, columns = (rows, width) if is_output else (width * group.fused, columns)
                    part = model.packed(f"{name}.weight")
                    if part is not None:
                        matrix = (columns, rows * part.parts) if part.transposed else (rows * part.parts, columns)
                        if part.by_shape and matrix[0] == matrix[1]:
                            raise UnsupportedArchitecture(
                                f"{model.family}: at width {width} the matrices of {part.stored} are square, and transformers "
                                "would not see that they are transposed; pass another --sparsity"
                            )
                        shapes[part.stored] = (len(group.members), *matrix)
                        bias_part = model.packed(f"{name}.bias")
                        if bias_part is not None:
                            shapes[bias_part.stored] = (len(group.members), rows * bias_part.parts)
                        continue
                    weight, bias_name = model.stored_name(f"{name}.weight"), model.stored_name(f"{name}.bias")
                    shapes[weight] = (columns, rows) if model.architecture.transposed else (rows, columns)
                    shapes[bias_name] = (rows,)
                    if bias and not model.has(f"{name}.bias"):
                        added[weight] = TensorSpec(bias_name, model.checkpoint.spec(weight).dtype, (rows,))
    specs = []
    for name, spec in model.checkpoint.tensors.items():
        specs.append(TensorSpec(name, spec.dtype, shapes.get(name, spec.shape)))
        if name in added:
            specs.append(added[name])
    return specs


def sparsity(model: Model, widths: Widths) -> float:
    """Share of all FFN channels that these widths remove."""
    pairs = [
        (group.width * len(group.members), width * len(group.members))
        for index, block in enumerate(widths)
        for group, width in zip(model.ffn_groups(index), block, strict=True)
    ]
    return 1 - sum(kept for _, kept in pairs) / sum(full for full, _ in pairs)
