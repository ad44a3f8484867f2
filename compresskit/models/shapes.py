"""Models with shapes but no weights: the planned result of a recipe step, used to plan the next steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import LARGEST_CONFIG_BYTES, first_line, read_json
from compresskit.errors import CheckpointError
from compresskit.formats.peft import Adapter
from compresskit.machine.precision import SAFETENSORS_NAMES
from compresskit.models.architectures import RAGGED_PREFIX
from compresskit.models.load import bind, check_configuration
from compresskit.models.model import Model

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LowBitShapes:
    """Low-bit linears of a checkpoint that is not written yet, by stored name."""

    shapes: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, list[str]]
    code_bits: Mapping[str, int]

    def holds(self, name: str) -> bool:
        """Whether this linear will be stored in low bits."""
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the linear."""
        return self.shapes[name]

    def bits(self, name: str) -> int:
        """Bits per code."""
        return self.code_bits[name]

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that will make up the weight."""
        return self.tensors[name]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Raise CheckpointError: there is nothing to read yet."""
        raise CheckpointError(f"{name}: is planned and not written yet; run the recipe first")


def without_weights(folder: Path, trust_remote_code: bool = False) -> Checkpoint:
    """Build the checkpoint that a configuration describes, in its stated dtype; raises CheckpointError if it makes no model."""
    import torch
    from transformers import AutoModelForCausalLM

    from compresskit.checkpoint.stock import quiet, stock_config
    from compresskit.models.ragged import register

    raw = read_json(folder / "config.json", LARGEST_CONFIG_BYTES)
    dtype = SAFETENSORS_NAMES.get(str(raw.get("dtype") or raw.get("torch_dtype")), "F32")
    check_configuration(Checkpoint(folder, raw, {}, {}), trust_remote_code)
    if str(raw.get("model_type")).startswith(RAGGED_PREFIX):  # the code in its folder is never run
        register()
        trust_remote_code = False
    try:
        with quiet(), torch.device("meta"):
            config = stock_config(folder, trust_remote_code)
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises whatever its classes raise
        reason = first_line(error)
        raise CheckpointError(f"{folder / 'config.json'}: makes no model ({reason}); restore the file from its source") from error
    tied = set(network.all_tied_weights_keys)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items() if name not in tied}
    return Checkpoint(folder, raw, {name: TensorSpec(name, dtype, shape) for name, shape in shapes.items()}, {})


def dense_shapes(model: Model, outputs: Outputs) -> Model:
    """Build the dense model with these output files from `model`."""
    tensors = {spec.name: spec for spec in outputs.tensors}
    assert outputs.config is not None
    return bind(replace(model.checkpoint, config=outputs.config, tensors=tensors, file_of={}, manifest=None), True)


def low_bit_shapes(model: Model, outputs: Outputs, low_bit: LowBitShapes) -> Model:
    """Build the low-bit model with these output files from the dense `model`."""
    tensors = {spec.name: spec for spec in outputs.tensors}
    assert outputs.config is not None
    checkpoint = replace(model.checkpoint, config=outputs.config, tensors=tensors, file_of={}, manifest=None)
    return replace(model, checkpoint=checkpoint, format=low_bit)


def adapter_shapes(model: Model, specs: list[TensorSpec]) -> Model:
    """Return the model with an adapter of these factors, replacing any existing one."""
    store = Checkpoint(model.checkpoint.folder, {}, {spec.name: spec for spec in specs}, {})
    return replace(model, adapter=Adapter(model.checkpoint.folder, {}, store) if specs else None)
