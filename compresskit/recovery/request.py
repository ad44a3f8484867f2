"""What `recover` is asked for: the checks that need no weights, and what the run will write and need."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from compresskit import distributed
from compresskit.checkpoint import source
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.evaluation.request import scoring_bytes
from compresskit.evaluation.scores import check_comparable, check_context
from compresskit.formats import peft
from compresskit.formats.compressed_tensors import PackQuantized
from compresskit.job import PASSES_SAMPLING, Request, where_used
from compresskit.machine.device import Where
from compresskit.models import layouts
from compresskit.models.load import open_any, open_model
from compresskit.models.model import Model
from compresskit.models.shapes import adapter_shapes, dense_shapes
from compresskit.recovery.cost import BOTH_STREAMS, PASSES_TRAINING, instruction_size, streamed_tokens, training_bytes
from compresskit.recovery.data.encoding import check_same_tokenizer
from compresskit.recovery.method import BudgetMethod, SelectionMethod
from compresskit.recovery.options import RecoverOptions
from compresskit.recovery.training.ranks import linear_ranks
from compresskit.walk.cost import edit_bytes, head_share, scratch_bytes, walk_bytes

EXTRAS = ("accelerate", "peft", "scipy")
"""What the extra `recover` installs."""
ADAPTER_DTYPE = "F32"
"""Of the factors that are written."""
NO_SETTINGS = frozenset(
    {"device", "dtype", "max_shard_size", "overwrite", "resume", "verify", "trust_remote_code", "original", "data", "show"}
)
"""Options that do not decide the weights, or that the settings name otherwise."""


@dataclass(frozen=True)
class RecoverRequest(Request):
    """A request to choose data and fine-tune a compressed model on it."""

    method: SelectionMethod
    options: RecoverOptions
    original: Model | None = None
    """The model before compression; left out where only shapes are asked for."""
    stage: ClassVar[str] = "recover"
    fixed_seconds: ClassVar[float] = 25.0
    """Imports of peft and accelerate, tokenizers, hashes, files."""
    left_bytes: ClassVar[int] = 480 << 20
    """What stays in the process for the steps after it: peft, accelerate, and holes in the heap."""

    @property
    def workspace(self) -> Path:
        """Where intermediate results are kept."""
        return WorkFolder(self.out).training

    @property
    def stores(self) -> list[Checkpoint]:
        """The opened folders of the source, of its adapter, and of the original."""
        stores = [self.model.checkpoint]
        stores += [self.model.adapter.store] if self.model.adapter else []
        stores += [self.original.checkpoint] if self.original else []
        return stores

    def settings(self, where: Where) -> dict[str, Any]:
        """Settings that determine the weights, besides the models and the content of the data files."""
        chosen = self.options.model_dump(exclude=set(NO_SETTINGS))
        files = {"data": [Path(path).name for path in self.options.data]}
        learned = {"loss": self.options.learned}
        return {"method": self.name, **self.method.model_dump(), **chosen, **learned, **files, **where_used(where)}

    def check(self) -> None:
        """Refuse what cannot be recovered.

        Raises:
            RequestError: there is no data, settings contradict each other, the context is too short for the samples, or peft
                or a full update cannot train such weights.
            UnsupportedArchitecture: weights are stored in a form into which trained ones cannot be written back.
        """
        model, options = self.model, self.options
        if not options.data:
            self._check_texts_alone()
        if options.data_weight is not None and options.learned != "distill":
            raise RequestError(
                "--data-weight: weighs the data's tokens against the original's predictions; give --loss distill, or leave it out"
            )
        check_context(model, options.sequence_length)
        if model.architecture.has_experts and (options.adapter_only or model.quantized):
            raise RequestError(
                f"{model.family}: peft loads no adapters of its experts; recover a dense checkpoint, without --adapter-only"
            )
        if form := unwritable(model):
            raise UnsupportedArchitecture(
                f"{model.family}: {form}, into which trained weights are not written back; prune it only"
            )
        if options.update == "full" and (options.adapter_only or model.quantized or model.adapter):
            raise RequestError(
                f"{model.checkpoint.folder}: --update full trains whole weights, of a dense source; use --update low-rank where "
                "weights are low-bit, or an adapter is wanted or already there"
            )
        if options.update == "grid":
            self._check_grid()
        if options.blocks_at_once:
            self._check_spans()

    def _check_texts_alone(self) -> None:
        options = self.options
        if options.select_only or options.show or not (options.self_samples or options.text_samples):
            raise RequestError(
                "--data: no instruction data given; pass --data FILE.jsonl, or --self-samples or --text-samples to train on "
                "plain text alone"
            )
        if self.method.chooses:
            raise RequestError(
                f"--data: no instruction data given for {self.name} to choose from; pass --data FILE.jsonl, or take `full`"
            )

    def _check_grid(self) -> None:
        model, folder = self.model, self.model.checkpoint.folder
        if not model.quantized:
            raise RequestError(f"{folder}: --update grid trains low-bit weights, and this is dense; use --update full")
        if self.options.adapter_only or model.adapter:
            raise RequestError(
                f"{folder}: --update grid trains no adapter; quantize with --rank 0 and leave --adapter-only out, or use "
                "--update low-rank"
            )
        if not isinstance(model.format, PackQuantized) or any(
            name.endswith(".weight_g_idx") for name in model.checkpoint.tensors
        ):
            raise RequestError(
                f"{folder}: --update grid trains pack-quantized integer codes in groups of consecutive inputs, and these weights "
                "are stored otherwise; quantize the dense model with apiq, gptq or rtn, or use --update low-rank"
            )

    def _check_spans(self) -> None:
        options, asked = self.options, f"--blocks-at-once {self.options.blocks_at_once}"
        if options.update != "grid":
            raise RequestError(
                f"{asked}: trains a grid block by block, and this is --update {options.update}; give --update grid"
            )
        if options.blocks_at_once > self.model.block_count:
            raise RequestError(
                f"{asked}: {self.model.checkpoint.folder} has {self.model.block_count} blocks; leave it out to train all together"
            )
        if options.learned != "distill":
            raise RequestError(f"{asked}: learns what the original computes; leave --loss {options.learned} out")
        if options.gradient_checkpointing:
            raise RequestError(f"{asked}: computes nothing twice; leave --gradient-checkpointing out, or take fewer blocks")
        if distributed.asked_count() > 1:
            raise RequestError(
                f"{asked}: does not share its work among processes, torchrun started {distributed.asked_count()}; "
                "start it without torchrun"
            )

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Rank of the low-rank update of every linear that gets one, by plain name."""
        return linear_ranks(self.model, self.options.rank)

    @property
    def adapter_tensors(self) -> list[TensorSpec]:
        """The factors of the low-rank updates."""
        return peft.adapter_specs(self.ranks, self.model.linear_shape, ADAPTER_DTYPE)

    def outputs(self) -> Outputs:
        """A merged checkpoint, a low-bit one with the adapter beside it, or the adapter alone; nothing of a selection."""
        model, options = self.model, self.options
        if options.select_only:
            return Outputs()
        if options.adapter_only:
            in_order = sorted(self.adapter_tensors, key=lambda spec: spec.name)  # as safetensors itself writes them
            text = peft.config_text(str(model.checkpoint.folder.resolve()), self.ranks)
            return Outputs(extra={peft.WEIGHTS: in_order}, files={peft.CONFIG: text})
        tensors, config, files = list(model.checkpoint.tensors.values()), dict(model.checkpoint.config), layouts.own_files(model)
        if not model.quantized or options.update == "grid":
            return Outputs(tensors, config, files=files)
        files[f"{peft.FOLDER}/{peft.CONFIG}"] = peft.config_text(str(self.out.resolve()), self.ranks)
        return Outputs(tensors, config, {f"{peft.FOLDER}/{peft.WEIGHTS}": self.adapter_tensors}, files)

    def result_model(self) -> Model:
        """The source with other weights, or with an adapter; the source itself where only a selection is made."""
        if self.options.select_only or self.options.update == "grid":
            return self.model
        if self.options.adapter_only or self.model.quantized:
            return adapter_shapes(replace(self.model, adapter=None), self.adapter_tensors)
        return dense_shapes(self.model, self.outputs())

    def passes(self) -> float:
        """Forward passes of one window: the selection, own texts, the original's predictions, what is held back, training."""
        options, method = self.options, self.method
        samples, length = instruction_size(options)
        pool = min(options.pool or samples, samples)
        share = 1 + head_share(self.model)
        selected = method.passes * pool * length
        if options.select_only:
            return selected * share
        chosen = (method.budget if isinstance(method, BudgetMethod) else 1.0) * pool
        others = options.self_samples + options.text_samples
        count, windows = chosen + others, chosen * length + others
        times = options.steps * options.batch_size / max(1.0, count) if options.steps else options.epochs
        predicted = min(1.0, times) * windows if options.learned == "distill" else 0.0
        judged = 2 * options.held_back * (pool * length if options.data else others)
        sampled, trained = PASSES_SAMPLING * options.self_samples, PASSES_TRAINING * times * windows
        streams = (BOTH_STREAMS * min(1.0, times) * windows + judged) if options.blocks_at_once else 0.0
        return (selected + sampled + predicted + judged + trained + streams) * share

    def peak_bytes(self) -> int:
        """Peak bytes: of the fine-tuning, of a walk, or of two models' predictions side by side."""
        model, windows, length = self.model, self.options.samples, self.options.sequence_length
        walked = walk_bytes(model, (windows, length), edit_bytes(model, True))
        return max(training_bytes(model, self.original, self.options), walked, scoring_bytes(model, windows * length))

    @property
    def scratch_bytes(self) -> int:
        """Room on disk, during the work alone, for the hidden states of both streams where spans of blocks are trained."""
        on_cpu = self.options.device in ("auto", "cpu")
        return scratch_bytes(self.model, streamed_tokens(self.options)) if self.options.blocks_at_once and on_cpu else 0


def open_request(method: SelectionMethod, source_name: str, out: Path, options: RecoverOptions) -> RecoverRequest:
    """Open both models and refuse what cannot be done before the data is read.

    Returns:
        The request, whose models belong together.

    Raises:
        RequestError: a package is missing, the models do not belong together, or a setting does not fit them.
        CompresskitError: what is wrong with a folder or OUT, of the kinds in errors.py.
    """
    _check_extras(options)
    model = open_any(source_name, options.trust_remote_code)
    original = open_model(source.resolve(options.original), options.trust_remote_code)
    request = RecoverRequest(method, model, out, options, original)
    request.check()
    check_comparable(model, original)
    check_same_tokenizer(model.checkpoint.folder, original.checkpoint.folder, options.trust_remote_code)
    request.check_text_and_out(model.bytes + sum(spec.bytes for spec in request.adapter_tensors))
    return request


def _check_extras(options: RecoverOptions) -> None:
    needed = ("scipy",) if options.select_only else EXTRAS
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise RequestError(f"recover: {', '.join(missing)} not installed; pip install 'compresskit[recover]'")


def unwritable(model: Model) -> str:
    """What of a model is stored in a form into which single weights cannot be written; "" if nothing is."""
    packed = next((each.stored for kind in model.architecture.kinds for each in kind.packed), "")
    if packed:
        return f"all experts of a block are stored in {packed}"
    return f"transformers makes {model.architecture.converted[0][0]} on loading" if model.architecture.converted else ""
