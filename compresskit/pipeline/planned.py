"""What a step would write, before anything is computed: models that have shapes and no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compresskit import layouts, source
from compresskit.checkpoint import writer as writing
from compresskit.checkpoint.reader import Checkpoint, TensorSpec, open_checkpoint, read_json
from compresskit.formats import peft
from compresskit.model import Model
from compresskit.opening import bind, with_adapter
from compresskit.pipeline.device import parse_bytes
from compresskit.recipe.steps import Step
from compresskit.stages import GridMethod, PruneMethod, QuantizeMethod, quantised_linears

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Planned:
    """A model that a step would give."""

    model: Model
    """Its linears' shapes, as if they were dense."""
    specs: list[TensorSpec]
    """The tensors of its checkpoint."""
    adapter: list[TensorSpec]
    """Those of the adapter beside it."""
    writes_checkpoint: bool = True
    """Whether the step's folder holds the checkpoint, or the adapter alone."""
    ranks: Mapping[str, int] | None = None
    """Of the adapter, by plain name."""

    def bytes(self, shard_bytes: int) -> int:
        """Size of the model's weight files, headers included."""
        return _file_bytes(self.specs, shard_bytes) + _file_bytes(self.adapter, shard_bytes)

    def disk_bytes(self, shard_bytes: int) -> int:
        """Size of what the step itself writes."""
        return self.bytes(shard_bytes) if self.writes_checkpoint else _file_bytes(self.adapter, shard_bytes)

    @property
    def parameters(self) -> int:
        """Numbers that the weights stand for, the adapter's included."""
        return self.model.checkpoint.parameters + sum(spec.elements for spec in self.adapter)


def _file_bytes(specs: list[TensorSpec], shard_bytes: int) -> int:
    return sum(shard.size for shard in writing.layout_shards(specs, shard_bytes)) if specs else 0


def planned_source(name: str, trust_remote_code: bool = False) -> Planned:
    """The model that a SOURCE means; a folder with a configuration and no weights will do."""
    folder = source.resolve(name)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        checkpoint = _without_weights(folder)
    else:
        checkpoint = open_checkpoint(folder)
    model = with_adapter(bind(checkpoint, trust_remote_code), None)
    adapter = list(model.adapter.store.tensors.values()) if model.adapter else []
    return Planned(model, list(checkpoint.tensors.values()), adapter)


def _without_weights(folder: Path) -> Checkpoint:
    """The checkpoint that a configuration describes, in its stated dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from compresskit.checkpoint.stock import quiet

    raw = read_json(folder / "config.json")
    dtype = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), "F32")
    with quiet(), torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    tied = set(network.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if name not in tied}
    return Checkpoint(folder, raw, {name: TensorSpec(name, dtype, shape) for name, shape in shapes.items()}, {})


def _prune(step: Step, given: Planned) -> Planned:
    from compresskit.pipeline.pruning import can_store_bias
    from compresskit.prune.structured import output_plan

    method, model = step.method, given.model
    assert isinstance(method, PruneMethod)
    bias = method.adds_bias and method.refit and can_store_bias(model)
    stored = layouts.stored_widths(model, _widths(method, model), method.layout)
    specs = output_plan(model, stored, bias)
    config, _ = layouts.configuration(model, stored)
    if bias and model.architecture.ffn_bias_key:
        config[model.architecture.ffn_bias_key] = True
    tensors = {spec.name: spec for spec in specs}
    return Planned(bind(replace(model.checkpoint, config=config, tensors=tensors, manifest=None)), specs, [])


def _widths(method: PruneMethod, model: Model) -> layouts.Widths:
    """Widths that add up to the asked sum; which block keeps more is only known once the text has been seen."""
    widest = max(group.width for index in range(model.block_count) for group in model.ffn_groups(index))
    step = method.widths_step(widest)
    widths: layouts.Widths = []
    owed = 0.0
    for index in range(model.block_count):
        widths.append([])
        for group in model.ffn_groups(index):
            owed += group.width * (1 - method.sparsity)
            width = group.width if method.sparsity == 0 else min(group.width, max(step, round(owed / step) * step))
            owed = 0.0 if method.allocation == "uniform" else owed - width
            widths[-1].append(width)
    return widths


def _quantize(step: Step, given: Planned) -> Planned | None:
    from compresskit.pipeline import quantization

    method, model = step.method, given.model
    if not isinstance(method, QuantizeMethod):
        return None
    method.check(model)
    schemes: dict[str, Any] = dict.fromkeys(quantised_linears(model, method.ignore), method.scheme(model))
    if isinstance(method, GridMethod) and method.mixed:
        schemes = {name: method.scheme_of(model, _bits_of_block(method.bits, model.block_of(name))) for name in schemes}
    shard_bytes = parse_bytes(step.options.model_dump()["max_shard_size"])
    job = quantization.Job(method, model, schemes, Path(step.name), step.options, shard_bytes)  # type: ignore[arg-type]
    ranks = dict.fromkeys(schemes, job.rank) if job.rank else None
    return Planned(model, job.plan, job.adapter_plan, ranks=ranks)


def _bits_of_block(average: float, block: int) -> int:
    """Whole bits that reach the average over the blocks; which block gets more is measured later."""
    lower = math.floor(average)
    share = average - lower
    return lower + (math.floor((block + 1) * share) > math.floor(block * share))


def _compensate(step: Step, given: Planned) -> Planned | None:
    from compresskit.compensate.contract import CompensateMethod
    from compresskit.compensate.plan import adapter_plan, dense_dtype, factor_dtype

    method, model, options = step.method, given.model, step.options.model_dump()
    if not isinstance(method, CompensateMethod):
        return None
    if options["merge"]:
        dtype = dense_dtype(model)
        weights = {model.stored_name(f"{name}.weight") for name in model.linears}
        specs = [replace(s, dtype=dtype) if s.name in weights else s for s in model.checkpoint.tensors.values()]
        return Planned(model, specs, [])
    names = [name for name in model.linears if not any(part in name for part in method.ignore)]
    rank = method.uniform_rank(model)
    if method.rank_budget is not None:
        rank = round(method.budget(model, names) / sum(sum(model.linear_shape(name)) for name in names))
    ranks = {name: rank + (given.ranks or {}).get(name, 0) for name in names}
    return replace(given, adapter=adapter_plan(model, ranks, factor_dtype(model, method.adapter_bits)),
                   ranks=ranks, writes_checkpoint=False)  # fmt: skip


def _recover(step: Step, given: Planned) -> Planned | None:
    """A merged recovery has its source's shapes; an adapter shares its rank among the linears."""
    options = step.options.model_dump()
    low_bit = given.specs != list(given.model.checkpoint.tensors.values())
    if options.get("select_only") or given.adapter or low_bit:
        return None
    if not options.get("adapter_only"):
        return replace(given, writes_checkpoint=True)
    shapes = {name: given.model.linear_shape(name) for name in given.model.linears}
    specs = [spec for name, shape in shapes.items() for spec in peft.plan(name, shape, int(options["rank"]), "F32")]
    return replace(given, adapter=specs, writes_checkpoint=False)


PLANNERS: dict[str, Callable[[Step, Planned], Planned | None]] = {
    "prune": _prune,
    "quantize": _quantize,
    "compensate": _compensate,
    "recover": _recover,
}
"""By stage; None, or a stage that is not here, means that sizes depend on what will be computed."""
