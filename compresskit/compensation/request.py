"""What `compensate` is asked for: the pair of models, the checks that need no weights, what the run will write and need."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint import source
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.compensation.method import OUTPUT_WEIGHT_WINDOWS, Aim, CompensateMethod
from compresskit.compensation.provenance import check_same_scales, trained_by_block
from compresskit.compensation.ranks import allocate_ranks
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.evaluation.request import scoring_bytes
from compresskit.formats import peft
from compresskit.job import HELD_BACK, Request
from compresskit.machine.device import Where
from compresskit.models import layouts
from compresskit.models.load import open_model, with_adapter
from compresskit.models.model import Model
from compresskit.models.pair import Pair, pair
from compresskit.models.shapes import adapter_shapes, dense_shapes
from compresskit.stages import Options
from compresskit.walk.cost import FLOAT32_BYTES, edit_bytes, embedding_bytes, head_share, hidden_bytes, walk_bytes

DENSE = ("F32", "F16", "BF16")
PASSES, PASSES_GAINS, PASSES_OUTPUT_WEIGHTS = 4.0, 1.5, 4.0
"""Of the repair; of the gains under a rank budget; of a forward, and another with gradients, for the weights of outputs."""
LOGIT_COPIES = 6
"""Of the logits of a window, gradients included, where a loss is differentiated step by step."""


class CompensateOptions(Options):
    """The shared options, the original, and what comes out."""

    original: str
    """Model from which SOURCE was made: a folder, a Hub id, or demo:smollm2-135m."""
    merge: bool = False
    """Write a dense checkpoint with the repair merged, instead of an adapter."""


@dataclass(frozen=True)
class CompensateRequest(Request):
    """A request to repair a compressed model."""

    method: CompensateMethod
    options: CompensateOptions
    original: Model | None = None
    """Left out where only shapes are asked for."""
    base: str = ""
    """SOURCE as adapters name it: a Hub id or an absolute path."""
    stage: ClassVar[str] = "compensate"

    @cached_property
    def pair(self) -> Pair:
        """The source beside its original; RequestError where they do not belong together."""
        assert self.original is not None
        return pair(self.model, self.original)

    @cached_property
    def names(self) -> list[str]:
        """The linears that are repaired, by plain name."""
        return [name for name in self.model.linears if not any(part in name for part in self.method.ignore)]

    @property
    def dense(self) -> bool:
        """Whether a dense checkpoint comes out."""
        return self.options.merge or self.method.splits

    @property
    def adapter_folder(self) -> str:
        """Where in OUT the adapter lies, with a slash."""
        return f"{peft.FOLDER}/" if self.method.splits else ""

    @property
    def aim(self) -> Aim:
        """What is repaired, as asked for or by how the source was made."""
        trained = not self.model.architecture.has_experts and trained_by_block(self.model.checkpoint.manifest)
        return self.method.chosen_aim(bool(self.original and self.pair.kept) or trained)

    @property
    def needs_text(self) -> bool:
        """Whether the repair itself looks at calibration text."""
        method = self.method
        return method.needs_activations or self.aim != "weight" or bool(method.rank_budget) or method.weighs_outputs

    @property
    def text(self) -> TextRequest:
        """The calibration text, the windows that are held back included."""
        options = self.options
        spec, samples = options.calibration, options.samples + HELD_BACK
        if not self.needs_text:
            spec, samples = ("builtin" if spec == "self" else spec), HELD_BACK
        return TextRequest(spec, samples, options.sequence_length, options.seed, HELD_BACK)

    @property
    def text_model(self) -> Model:
        """The original, which also samples `self`."""
        return self.original or self.model

    @property
    def stores(self) -> list[Checkpoint]:
        """The opened folders of the source, of its adapter, and of the model that reads the text."""
        adapters = [self.model.adapter.store] if self.model.adapter else []
        return [self.model.checkpoint, *adapters, self.text_model.checkpoint]

    def settings(self, where: Where) -> dict[str, Any]:
        """Settings that determine the weights, the aim that was chosen included."""
        return super().settings(where) | {"merge": self.options.merge, "aim": self.aim}

    def check(self) -> None:
        """Refuse what cannot be repaired.

        Raises:
            RequestError: nothing is left to repair, settings contradict each other, or a rank exceeds a linear.
            UnsupportedArchitecture: stock tools cannot load such an adapter.
        """
        method, model, merge = self.method, self.model, self.options.merge
        check_same_scales(model.checkpoint.manifest, model.checkpoint.folder)
        if not self.names:
            raise RequestError(f"--ignore {' '.join(method.ignore)}: leaves nothing to repair; ignore less")
        if method.splits and merge:
            raise RequestError("--merge: would put back what this method takes out; drop it")
        if model.architecture.has_experts and (method.splits or not merge):
            raise UnsupportedArchitecture(f"{model.family}: adapters cannot reach its experts; pass --merge")
        if model.architecture.transposed and (method.splits or not merge):
            raise UnsupportedArchitecture(f"{model.family}: its linears are stored transposed; pass --merge")
        if model.architecture.has_experts and self.aim != "weight":
            raise UnsupportedArchitecture(
                f"{model.family}: its experts see other tokens than the original's; only --aim weight of unpruned ones is built"
            )
        if model.adapter is not None and method.adapter_bits == 8 and not self.dense:
            raise RequestError(
                f"{model.adapter.folder}: this 16-bit adapter joins the new one; pass --adapter-bits 16, or --merge"
            )
        method.check_ranks(model, self.names)

    @property
    def dense_dtype(self) -> str:
        """The dtype of the tensors that are not in low bits, as safetensors names it."""
        found = [spec.dtype for spec in self.model.checkpoint.tensors.values() if len(spec.shape) > 1 and spec.dtype in DENSE]
        return found[0] if found else "F16"

    @property
    def factor_dtype(self) -> str:
        """The dtype of the adapter's factors, as safetensors names it."""
        return peft.factor_dtype(self.method.adapter_bits, "BF16" if self.dense_dtype == "BF16" else "F16")

    @property
    def small_factors(self) -> bool:
        """Whether the adapter's factors are stored in 8 bits."""
        return self.method.adapter_bits == 8

    def even_ranks(self) -> dict[str, int]:
        """The rank of every linear that is repaired: the asked one, or an even share of the budget before gains are known."""
        if self.method.rank_budget is None:
            return dict.fromkeys(self.names, self.method.uniform_rank(self.model))
        shapes = {name: self.model.linear_shape(name) for name in self.names}
        costs = {name: sum(shape) for name, shape in shapes.items()}
        # Gains that fall alike a parameter: every linear gets a rank in turn, as long as the budget lasts.
        gains = {name: [costs[name] / (1 + rank) for rank in range(min(shape))] for name, shape in shapes.items()}
        return allocate_ranks(gains, costs, self.method.budget(self.model, self.names), self.method.round_rank)

    def adapter_ranks(self, ranks: Mapping[str, int]) -> dict[str, int]:
        """Ranks of the adapter that comes out, those of one that the source brings included; linears without any are left out."""
        brought = None if self.method.splits else self.model.adapter
        before = {name: brought.rank(name) if brought else 0 for name in ranks}
        return {name: rank + before[name] for name, rank in ranks.items() if rank + before[name]}

    def outputs(self, ranks: Mapping[str, int] | None = None) -> Outputs:
        """The files of the dense checkpoint, or of the adapter; `ranks` None: those of `even_ranks`."""
        tensors, config, files = [], None, {}
        if self.dense:
            tensors, config, files = self._dense_tensors(), self._configuration(), layouts.own_files(self.model)
        if self.options.merge:
            return Outputs(tensors, config, files=files)
        found = self.adapter_ranks(self.even_ranks() if ranks is None else ranks)
        factors = peft.adapter_specs(found, self.model.linear_shape, self.factor_dtype)
        return Outputs(tensors, config, {self.adapter_folder + peft.WEIGHTS: factors}, files)

    def _configuration(self) -> dict[str, Any]:
        """config.json of the dense checkpoint."""
        return {key: value for key, value in self.model.checkpoint.config.items() if key != "quantization_config"}

    def _dense_tensors(self) -> list[TensorSpec]:
        """The tensors of the dense checkpoint: linears in one dtype, all else as it is, in the source's order."""
        model = self.model
        owners: dict[str, list[str]] = {}
        for name in model.linears:
            stored = [model.spec_of(f"{name}.weight").name] if not model.is_low_bit(name) else []
            packed = model.format.stored_tensors(model.stored_name(name)) if model.format and not stored else stored
            for tensor in packed:  # one linear's, or that of all experts of a block
                owners.setdefault(tensor, []).append(name)
        specs: dict[str, TensorSpec] = {}
        for tensor, spec in model.checkpoint.tensors.items():
            for name in owners.get(tensor, []):
                shape, weight = model.linear_shape(name), f"{model.stored_name(name)}.weight"
                specs[weight] = TensorSpec(weight, self.dense_dtype, shape[::-1] if model.architecture.transposed else shape)
            if tensor not in owners:
                specs[tensor] = spec
        return list(specs.values())

    def result_model(self) -> Model:
        """The merged model, or the source with the new adapter."""
        outputs = self.outputs()
        factors = outputs.extra.get(self.adapter_folder + peft.WEIGHTS, [])
        model = replace(self.model, adapter=None)
        return adapter_shapes(dense_shapes(model, outputs) if self.dense else model, factors)

    def passes(self) -> float:
        """Forward passes of a window: the repair, the gains of a budget, the weights of outputs, the final KL divergence."""
        method, windows, share = self.method, self.options.samples, 1 + head_share(self.model)
        passes = 2 * HELD_BACK * share + (self.sampling_passes if self.needs_text else 0.0)
        if self.needs_text:
            passes += PASSES * windows
        if method.rank_budget is not None:
            passes += PASSES_GAINS * windows
        if method.weighs_outputs:
            passes += PASSES_OUTPUT_WEIGHTS * min(windows, OUTPUT_WEIGHT_WINDOWS) * share
        return passes

    def peak_bytes(self) -> int:
        """Peak bytes: of the walk, of the gradient at the head, or of the final KL divergence."""
        model, length = self.model, self.options.sequence_length
        windows = self.options.samples if self.needs_text else 0
        walked = walk_bytes(model, (windows, length), edit_bytes(model, self.method.needs_activations))
        scored = scoring_bytes(model, HELD_BACK * length)
        return max(walked, scored, self._head_gradient_bytes() if self.method.weighs_outputs else 0)

    def _head_gradient_bytes(self) -> int:
        """Last hidden states and their gradients, the head, and what a backward pass needs of one window's logits."""
        length, windows = self.options.sequence_length, min(self.options.samples, OUTPUT_WEIGHT_WINDOWS)
        logits = LOGIT_COPIES * length * self.model.vocabulary * FLOAT32_BYTES
        return 2 * hidden_bytes(self.model, windows * length) + embedding_bytes(self.model) + logits


def open_request(method: CompensateMethod, source_name: str, out: Path, options: CompensateOptions) -> CompensateRequest:
    """Open both models and refuse what cannot be done; invalid input is refused in under a second, before any weight is read.

    Returns:
        The request, whose models belong together.

    Raises:
        RequestError: the source is an adapter, the models do not belong together, or a setting does not fit them.
        CompresskitError: what is wrong with a folder, the text or OUT, of the kinds in errors.py.
    """
    folder = source.resolve(source_name)
    if (folder / peft.CONFIG).is_file() and not (folder / "config.json").is_file():
        raise RequestError(f"{folder}: is an adapter; pass the checkpoint that it belongs to")
    compressed = with_adapter(open_model(folder, options.trust_remote_code), None)
    original = with_adapter(open_model(source.resolve(options.original), options.trust_remote_code), None)
    base = source.hub_name(source_name) or str(folder.resolve())
    request = CompensateRequest(method, compressed, out, options, original, base)
    both = request.pair  # which is refused where the models do not belong together
    request.check()
    weights = sum(math.prod(both.compressed.linear_shape(name)) for name in request.names)
    request.check_text_and_out(FLOAT32_BYTES * weights if request.dense else 0)
    return request
