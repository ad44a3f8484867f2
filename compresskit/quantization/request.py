"""Request of `quantize`: checks without weights, planned output and cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint import source
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import RequestError
from compresskit.formats import peft
from compresskit.job import HELD_BACK, Request
from compresskit.machine.device import Where
from compresskit.machine.precision import SAFETENSORS_NAMES, TORCH_NAMES
from compresskit.models import layouts
from compresskit.models.architectures import HEAD
from compresskit.models.load import open_model
from compresskit.models.loadable import quantised_linears
from compresskit.models.model import BITS_PER_BYTE, Model
from compresskit.models.shapes import LowBitShapes, adapter_shapes, low_bit_shapes
from compresskit.numerics.scheme import Scheme
from compresskit.quantization import cost
from compresskit.quantization.block_method import BlockMethod
from compresskit.quantization.method import GridMethod, QuantizeMethod
from compresskit.quantization.unit_schemes import mixed_schemes
from compresskit.stages import Options


@dataclass(frozen=True)
class QuantizeRequest(Request):
    """A request to store a model in few bits."""

    method: QuantizeMethod
    bits: tuple[int, ...] = ()
    """Bits of every block under mixed precision, once they are measured."""
    stage: ClassVar[str] = "quantize"

    def check(self) -> None:
        """Refuse what cannot be quantized.

        Raises:
            RequestError: the source is in low bits, nothing is left to quantize, or the grid fits no linear or no client.
            UnsupportedArchitecture: stock tools could not load the result.
        """
        model, folder = self.model, self.model.checkpoint.folder
        if model.quantized:
            raise RequestError(f"{folder}: is quantized already; quantize the dense checkpoint it was made from")
        if model.weight_dtype not in ("F32", "F16", "BF16"):
            raise RequestError(f"{folder}: holds {model.weight_dtype} weights; quantize a 16- or 32-bit checkpoint")
        self.method.check(model)
        if not self.schemes:
            raise RequestError(f"--ignore {' '.join(self.method.ignore)}: leaves nothing to quantize; ignore less")
        self.method.check_client(self.schemes.values())

    @cached_property
    def schemes(self) -> dict[str, Scheme | None]:
        """The grid of every linear that is quantized, by plain name; RequestError where it does not fit one."""
        method, model = self.method, self.model
        names = quantised_linears(model, method.ignore)
        if not names or not isinstance(method, GridMethod) or not method.mixed:
            return dict.fromkeys(names, method.scheme(model) if names else None)
        if not method.unit_grids:
            method.scheme(model)  # which is refused where its groups do not divide the inputs of a linear
        return mixed_schemes(method, model, names, self.bits)

    @property
    def text(self) -> TextRequest:
        """Calibration text: the windows that are held back, and the samples of a method that looks at any.

        A method that needs no text is not made to wait for text sampled from the model.
        """
        options = self.options
        spec, samples = options.calibration, options.samples + HELD_BACK
        if not self.method.needs_text:
            spec, samples = ("builtin" if spec == "self" else spec), HELD_BACK
        return TextRequest(spec, samples, options.sequence_length, options.seed, HELD_BACK)

    @property
    def rank(self) -> int:
        """Of the adapter that is trained beside the weights, 0 for none."""
        return self.method.adapter_rank(self.model) if isinstance(self.method, BlockMethod) else 0

    @property
    def scale_dtype(self) -> str:
        """Of the stored scales, as safetensors names it: bfloat16 for a bfloat16 checkpoint, else float16, the finer one."""
        return "BF16" if self.model.weight_dtype == "BF16" else "F16"

    @property
    def unpacked_dtype(self) -> str:
        """In which readers unpack the weights: the scales' dtype; where they keep them packed, the one in config.json."""
        config = self._configuration()
        packed = len(set(self.schemes.values())) > 1 and not config["quantization_config"].get("dequantize")
        return SAFETENSORS_NAMES[config.get("dtype") or config.get("torch_dtype") or "float32"] if packed else self.scale_dtype

    @property
    def factor_dtype(self) -> str:
        """Of the adapter's factors, likewise."""
        small = isinstance(self.method, BlockMethod) and self.method.has_small_factors
        return peft.factor_dtype(8 if small else 16, self.scale_dtype)

    def settings(self, where: Where) -> dict[str, Any]:
        """Settings that determine the weights; a grid with the group size and the symmetry that were chosen for it."""
        chosen = next(iter(self.schemes.values()))
        return super().settings(where) | self.method.grid_settings(chosen)

    def outputs(self) -> Outputs:
        """The checkpoint's files, and the adapter's; under mixed precision of even bits until those are measured."""
        extra = {f"{peft.FOLDER}/{peft.WEIGHTS}": self.adapter_tensors} if self.rank else {}
        return Outputs(self._stored_tensors(), self._configuration(), extra, layouts.own_files(self.model))

    def _configuration(self) -> dict[str, Any]:
        """config.json: the source's keys, and how the linears are stored."""
        dtype = TORCH_NAMES[self.model.weight_dtype]
        dense = [name for name in self.model.linears if name not in self.schemes]
        others = self.model.architecture.dense_linears if self.model.architecture.derived else [HEAD]
        config = dict(self.model.checkpoint.config)
        if self.method.embedding_bits == 16 and dtype == "float32":
            dtype = config["dtype"] = "float16"
        config["quantization_config"] = self.method.configuration(self.schemes, [*others, *dense], dtype)
        return config

    def linear_tensors(self, name: str) -> list[TensorSpec]:
        """The stored tensors of one quantised linear."""
        model = self.model
        return self.method.tensor_specs(model.stored_name(name), model.linear_shape(name), self.schemes[name], self.scale_dtype)

    def _stored_tensors(self) -> list[TensorSpec]:
        """Every tensor of the checkpoint, in the source's order."""
        model = self.model
        weights: dict[str, list[str]] = {}
        for name in self.schemes:
            weights.setdefault(model.spec_of(f"{name}.weight").name, []).append(name)
        specs = []
        for stored, spec in model.checkpoint.tensors.items():
            if stored in weights:  # one linear, or all experts of a block
                specs += [tensor for name in weights[stored] for tensor in self.linear_tensors(name)]
            else:
                outside = model.stored_block_of(stored) is None
                halved = self.method.embedding_bits == 16 and spec.dtype == "F32" and outside
                specs.append(replace(spec, dtype=self.scale_dtype) if halved else spec)
        return [*specs, *(spec for index in range(model.block_count) for spec in self.method.block_specs(model, index))]

    @property
    def adapter_tensors(self) -> list[TensorSpec]:
        """The tensors of the adapter."""
        return peft.adapter_specs(
            {name: self.rank for name in self.schemes if self.rank}, self.model.linear_shape, self.factor_dtype
        )

    @property
    def stored_bits(self) -> float:
        """Stored bits a weight of the quantised linears: codes, scales, zero points, adapter."""
        stored = sum(spec.bytes for spec in self.adapter_tensors)
        stored += sum(spec.bytes for name in self.schemes for spec in self.linear_tensors(name))
        return BITS_PER_BYTE * stored / sum(math.prod(self.model.linear_shape(name)) for name in self.schemes)

    def result_model(self) -> Model:
        """The low-bit model, with its adapter; the source's shapes where the result counts as dense."""
        if self.method.reads_as_dense:
            return self.model
        model, stored = self.model, {name: self.model.stored_name(name) for name in self.schemes}
        low_bit = LowBitShapes(
            {stored[name]: model.linear_shape(name) for name in self.schemes},
            {stored[name]: [spec.name for spec in self.linear_tensors(name)] for name in self.schemes},
            {stored[name]: scheme.bits if scheme else 4 for name, scheme in self.schemes.items()},
        )
        return adapter_shapes(low_bit_shapes(model, self.outputs(), low_bit), self.adapter_tensors)

    def passes(self) -> float:
        """Forward passes of a window."""
        sampling = self.sampling_passes if self.method.needs_text else 0.0
        return sampling + cost.passes(self.method, self.model, self.options.samples, self.options.sequence_length)

    def peak_bytes(self) -> int:
        """Peak bytes: of the walk, of a backward pass, or of the final KL divergence."""
        return cost.peak_bytes(self.method, self.model, self.options.samples, self.options.sequence_length)

    @property
    def scratch_bytes(self) -> int:
        """Room on disk during the work alone, for hidden states and a guide."""
        guide = cost.guide_scratch_bytes(self.method, self.model, self.options.samples, self.options.sequence_length)
        return super().scratch_bytes + guide


def open_request(method: QuantizeMethod, source_name: str, out: Path, options: Options) -> QuantizeRequest:
    """Open the source and refuse what cannot be done; invalid input is refused in under a second, before any weight is read.

    Returns:
        The request, all checks passed.

    Raises:
        CompresskitError: of the kinds in errors.py, what is wrong with the source, the text, OUT or a setting.
    """
    model = open_model(source.resolve(source_name), options.trust_remote_code)
    request = QuantizeRequest(method, model, out, options)
    request.check()
    request.check_text_and_out(sum(spec.bytes for spec in request.outputs().specs))
    return request
