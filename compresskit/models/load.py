"""Open a checkpoint folder as a model: identify the family, check the shapes, add an adapter.

Does not import torch, so a checkpoint that contradicts its configuration is refused in under a second.
"""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from compresskit.checkpoint import source
from compresskit.checkpoint.reader import Checkpoint, open_checkpoint
from compresskit.checkpoint.small_files import read_text, shown
from compresskit.errors import CheckpointError, RequestError, UnsupportedArchitecture, near_miss
from compresskit.formats import open_format
from compresskit.formats.peft import CONFIG as ADAPTER_CONFIG
from compresskit.formats.peft import FOLDER as ADAPTER_FOLDER
from compresskit.formats.peft import Adapter, factor_names, open_adapter
from compresskit.formats.stored_forms import as_dense
from compresskit.models.architectures import ARCHITECTURES, DOWN, GATE_AND_UP, RAGGED_PREFIX, Architecture
from compresskit.models.initialised import as_plain
from compresskit.models.layouts import own_config
from compresskit.models.model import EXPERT_KEYS, Model
from compresskit.models.shape_checks import check_shapes
from compresskit.models.structure_cache import derived
from compresskit.models.tied_head import with_embedding

PACKED_EXPERTS = (f".experts.{GATE_AND_UP}", f".experts.{DOWN}")
"""How the names of tensors end that hold all experts of a block."""
LARGEST_CODE_BYTES = 1 << 24
LARGEST_NUMBER = (1 << 31) - 1
"""Of a size in config.json."""
MOST_BLOCKS = 10_000
COUNT_KEYS = (
    *EXPERT_KEYS, "num_attention_heads", "n_head", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions",
)  # fmt: skip
"""Keys that a configuration may leave out, and that hold a whole number where it has them."""
LONGEST_FAMILY = 40
"""Characters that are compared with the names of the families."""
STDIN = "-"


def bind(checkpoint: Checkpoint, trust_remote_code: bool = False) -> Model:
    """Identify the family of a checkpoint and check its tensors against its configuration.

    Returns:
        The model, without an adapter; no weights are read.

    Raises:
        UnsupportedArchitecture: the family is not in the table.
        RequestError: the checkpoint ships code, but code is not allowed.
        CheckpointError: a tensor is missing or its shape contradicts the configuration.
    """
    family = check_family(checkpoint, trust_remote_code)
    checkpoint = as_dense(checkpoint)
    architecture = architecture_of(checkpoint, family, trust_remote_code)
    config = own_config(checkpoint.config, architecture)
    if not trust_remote_code and not _is_ragged(checkpoint):  # transformers' own classes are used, and OUT brings no code
        config.pop("auto_map", None)
    checkpoint = replace(checkpoint, config=config)
    prefix = "" if architecture.derived else _removed_prefix(checkpoint, architecture)
    code = _trusted_code(checkpoint) if trust_remote_code and "auto_map" in config and not _is_ragged(checkpoint) else {}
    model = with_embedding(Model(checkpoint, family, architecture, prefix, open_format(checkpoint), code=code), trust_remote_code)
    check_shapes(model)
    return model


def _trusted_code(checkpoint: Checkpoint) -> dict[str, str]:
    """The text of the code files beside a checkpoint; OUT needs them to be loaded."""
    return {path.name: read_text(path, LARGEST_CODE_BYTES) for path in sorted(checkpoint.folder.glob("*.py"))}


def check_configuration(checkpoint: Checkpoint, trust_remote_code: bool = False) -> None:
    """Check the family (`check_family`) and, for a family of the table, the numbers in config.json."""
    family = check_family(checkpoint, trust_remote_code)
    if family in ARCHITECTURES:
        _check_numbers(checkpoint, ARCHITECTURES[family])


def architecture_of(checkpoint: Checkpoint, family: str, trust_remote_code: bool = False) -> Architecture:
    """Find the structure of a checkpoint's model.

    Returns:
        The family's row of the table if the stored tensors fit it, else what is derived from the stock network.

    Raises:
        UnsupportedArchitecture: transformers has no such model type, or its network cannot be walked.
        CheckpointError: a number in config.json is missing or of another type, or transformers takes no such configuration.
    """
    own_code = trust_remote_code and "auto_map" in checkpoint.config and not _is_ragged(checkpoint)
    row = None if own_code else ARCHITECTURES.get(family)
    if row is not None and _fits(row, checkpoint):
        _check_numbers(checkpoint, row)
        return row
    return derived(checkpoint, trust_remote_code)


def _fits(row: Architecture, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint stores its tensors as the row says: experts one by one, not all of a block in one tensor."""
    return not row.experts or not any(name.endswith(PACKED_EXPERTS) for name in checkpoint.tensors)


def _is_ragged(checkpoint: Checkpoint) -> bool:
    return str(checkpoint.config.get("model_type")).startswith(RAGGED_PREFIX)


def check_family(checkpoint: Checkpoint, trust_remote_code: bool = False) -> str:
    """Identify the family by config.json.

    Returns:
        Its name: the model type, without the prefix of ragged checkpoints.

    Raises:
        RequestError: the checkpoint ships code for a type that transformers lacks, but code is not allowed.
        CheckpointError: there is no model type.
        UnsupportedArchitecture: transformers has no such model type.
    """
    config_file = checkpoint.folder / "config.json"
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{config_file}: has no model_type; restore the file from its source")
    family = model_type.removeprefix(RAGGED_PREFIX)
    own_code = "auto_map" in checkpoint.config and model_type == family
    if own_code and not trust_remote_code and family not in ARCHITECTURES and not _has_native(family):
        raise RequestError(f"{config_file}: the model brings its own code (auto_map); read it, then pass --trust-remote-code")
    if not own_code and family not in ARCHITECTURES and not _has_native(family):
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        hint = near_miss(family[:LONGEST_FAMILY], [name for name in CONFIG_MAPPING_NAMES if isinstance(name, str)])
        raise UnsupportedArchitecture(
            f"{config_file}: transformers {_transformers_version()} has no model type {shown(model_type)}; update it, or pass "
            f"--trust-remote-code if the checkpoint brings its own code.{hint}"
        )
    return family


def _has_native(family: str) -> bool:
    """Whether transformers itself has the model type. Most are named in a file of their own; to import the list takes long."""
    name = family.replace("-", "_")
    library = find_spec("transformers")
    if name.isidentifier() and len(name) <= LONGEST_FAMILY and library is not None and library.origin:
        file = Path(library.origin).parent / "models" / name / f"configuration_{name}.py"
        if file.is_file() and f'model_type = "{family}"' in file.read_text(encoding="utf-8"):
            return True
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return family in CONFIG_MAPPING_NAMES


def _transformers_version() -> str:
    return importlib.metadata.version("transformers")


def _check_numbers(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise CheckpointError unless the sizes in config.json are whole numbers of a possible size."""
    needed = {architecture.hidden_key: LARGEST_NUMBER, architecture.count_key: MOST_BLOCKS, "vocab_size": LARGEST_NUMBER}
    config = checkpoint.config
    given = {key: LARGEST_NUMBER for key in COUNT_KEYS if config.get(key) is not None}
    for key, largest in (given | needed).items():
        least = 0 if key in EXPERT_KEYS else 1
        value = config.get(key)
        if type(value) is not int or not least <= value <= largest:
            raise CheckpointError(
                f"{checkpoint.folder / 'config.json'}: {key} is {shown(value)}, expected a whole number from {least} to "
                f"{largest}; restore the file from its source"
            )


def with_adapter(model: Model, folder: Path | None) -> Model:
    """Add the adapter in a folder to a model; None uses the one in the model's own folder, if any.

    Returns:
        The model with the adapter, or the model itself if there is none.

    Raises:
        CheckpointError: the folder holds no adapter.
        RequestError: the adapter was made for another model, or is not a plain LoRA.
    """
    own = model.checkpoint.folder / ADAPTER_FOLDER
    if folder is None and not own.is_dir():
        return model
    return attached(model, open_adapter(folder or own))


def attached(model: Model, adapter: Adapter) -> Model:
    """Attach an opened adapter, as plain LoRA; raises RequestError if it was made for another model, or changes it unknowably."""
    linears = set(model.linears)
    for name in adapter.names:
        if name not in linears:
            raise RequestError(f"{adapter.folder}: updates {name}, which {model.checkpoint.folder} does not have")
        found = tuple(adapter.store.spec(n).shape[axis] for n, axis in zip(factor_names(name)[::-1], (0, 1), strict=True))
        if found != model.linear_shape(name):
            raise RequestError(
                f"{adapter.folder}: {name} is {list(found)} there, {list(model.linear_shape(name))} in "
                f"{model.checkpoint.folder}; use the adapter that was made for it"
            )
    return replace(model, adapter=as_plain(adapter, model, adapter.names))


def open_any(source_name: str, trust_remote_code: bool = False, adapter: str | None = None) -> Model:
    """Open a SOURCE argument: a checkpoint, or an adapter folder that names its base model.

    `adapter` is the folder of another adapter, or "none"; by default the adapter in the checkpoint's own folder is used.

    Returns:
        The model with its adapter; no weights are read.

    Raises:
        CheckpointError: the folder is unusable, or an adapter names no base.
        UnsupportedArchitecture: the family is not in the table.
        RequestError: the checkpoint ships code that is not allowed, or the adapter does not fit.
    """
    folder = source.resolve(source_name)
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file():
        base = open_adapter(folder).config.get("base_model_name_or_path")
        if not isinstance(base, str) or not base or base == STDIN:
            raise CheckpointError(f"{folder / ADAPTER_CONFIG}: names no base model; pass the checkpoint with --adapter {folder}")
        model = open_model(source.resolve(base), trust_remote_code)
        return model if adapter == "none" else with_adapter(model, Path(adapter) if adapter else folder)
    model = open_model(folder, trust_remote_code)
    return model if adapter == "none" else with_adapter(model, Path(adapter) if adapter else None)


def open_model(folder: Path, trust_remote_code: bool = False) -> Model:
    """`open_checkpoint` followed by `bind`."""
    return bind(open_checkpoint(folder), trust_remote_code)


def _removed_prefix(checkpoint: Checkpoint, architecture: Architecture) -> str:
    parts = architecture.blocks.split(".")
    for cut in range(len(parts)):
        if any(name.startswith(".".join(parts[cut:]) + ".0.") for name in checkpoint.tensors):
            return "".join(f"{part}." for part in parts[:cut])
    raise CheckpointError(
        f"{checkpoint.folder}: no tensor of {architecture.blocks}.0; is this the checkpoint of a language model?"
    )
