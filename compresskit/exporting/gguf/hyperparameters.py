"""Hyperparameters of a model as keys of GGUF, from config.json as transformers completes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compresskit.checkpoint.small_files import first_line
from compresskit.errors import CheckpointError, UnsupportedArchitecture
from compresskit.exporting.gguf.families import ATTENDING_TO_ALL, FULL, SLIDING, Family, Settings
from compresskit.models.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

NOT_READ = ("model_type", "architectures", "auto_map", "block_configs", "quantization_config")
WINDOWED = ("gemma2", "gemma3")
"""Architectures of which llama.cpp knows the sliding window."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")


def configuration(model: Model) -> PreTrainedConfig:
    """config.json as the family's class of transformers completes it; raises CheckpointError if it takes no such values."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from compresskit.checkpoint.stock import quiet

    given = {key: value for key, value in model.checkpoint.config.items() if key not in NOT_READ}
    try:
        with quiet():
            found: PreTrainedConfig = CONFIG_MAPPING[model.family](**given)
    except Exception as error:  # transformers raises errors of every kind
        file = model.checkpoint.folder / "config.json"
        raise CheckpointError(f"{file}: transformers does not take it ({first_line(error)}); restore the file") from error
    return found


def settings(model: Model, config: Any, family: Family, architecture: str, widths: list[int]) -> tuple[Settings, list[str]]:
    """Hyperparameters of a model whose blocks have these FFN widths in the file.

    Returns:
        (values by name of the GGUFWriter's method without `add_`, notes for the user).

    Raises:
        UnsupportedArchitecture: a value is another than the one that llama.cpp has built in.
    """
    try:
        _check_activation(config, family)
        own = family.own(config)
        rope = _rope(config, architecture)
    except ValueError as error:
        raise UnsupportedArchitecture(f"{model.family}: {error}; it cannot be exported to GGUF") from error
    heads, kv_heads = heads_of(config)
    per_block = len(set(widths)) > 1
    found: Settings = {
        "context_length": config.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "block_count": model.block_count,
        "feed_forward_length": widths if per_block else widths[0],
        "head_count": [heads] * len(widths) if architecture == family.per_block else heads,
        "head_count_kv": [kv_heads] * len(widths) if architecture == family.per_block else kv_heads,
        "key_length": head_width(config),
        "value_length": head_width(config),
        "vocab_size": model.vocabulary,
        **_epsilon(config),
        **rope,
        **own,
    }
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or [SLIDING]
    windowed = window and SLIDING in kinds and window < config.max_position_embeddings and architecture not in WINDOWED
    return found, [ATTENDING_TO_ALL.format(window=window)] if windowed else []


def heads_of(config: Any) -> tuple[int, int]:
    """(attention heads, heads of keys and values)."""
    heads = int(config.num_attention_heads)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def head_width(config: Any) -> int:
    """Channels of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope_factors(config: Any) -> dict[str, NDArray[np.float32]]:
    """What rotation frequencies are divided by: tensors (rotated channels / 2,) by name; none for plain rotation."""
    stated = _rope_of(config)
    if stated.get("rope_type") == "longrope":
        names = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
        return {name: np.array(stated[key], np.float32) for name, key in names.items()}
    return {"rope_freqs.weight": llama3_factors(stated, head_width(config))} if stated.get("rope_type") == "llama3" else {}


def llama3_factors(stated: dict[str, Any], width: int) -> NDArray[np.float32]:
    """Factors of Llama 3.1 for a head of so many channels, (width / 2,).

    Wavelengths above original / low_freq_factor are stretched by `factor`, those below original / high_freq_factor stay; in
    between, frequencies are interpolated by how many wavelengths the original context holds.

    Returns:
        What each frequency is divided by.
    """
    original, factor = stated["original_max_position_embeddings"], float(stated["factor"])
    low, high = float(stated["low_freq_factor"]), float(stated["high_freq_factor"])
    frequencies = float(stated["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    held = original * frequencies / (2 * math.pi)  # wavelengths in the original context
    share = np.clip((held - low) / (high - low), 0.0, 1.0)
    found: NDArray[np.float32] = (1.0 / (share + (1.0 - share) / factor)).astype(np.float32)
    return found


def _check_activation(config: Any, family: Family) -> None:
    named = [getattr(config, key, None) for key in ("hidden_activation", "hidden_act", "activation_function")]
    found = next((each for each in named if each), family.activations[0])
    if found not in family.activations:
        raise ValueError(f"activation {found!r}, llama.cpp has {family.activations[0]!r} built in")


def _epsilon(config: Any) -> Settings:
    if hasattr(config, "rms_norm_eps"):
        return {"layer_norm_rms_eps": config.rms_norm_eps}
    keys = ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps")
    return {"layer_norm_eps": next(getattr(config, key) for key in keys if hasattr(config, key))}


def _rope_of(config: Any) -> dict[str, Any]:
    """The rotation of blocks that attend to all tokens."""
    stated = getattr(config, "rope_parameters", None) or {}
    found: dict[str, Any] = stated.get(FULL, stated)
    return found


def _rope(config: Any, architecture: str) -> Settings:
    """Keys of the rotation; raises ValueError for kinds that llama.cpp does not know."""
    stated = _rope_of(config)
    if not stated:
        return {}
    kind = stated.get("rope_type") or "default"
    if kind not in ROPE_TYPES or (kind == "longrope" and architecture != "phi3"):
        raise ValueError(f"rope_type {kind!r}, llama.cpp has no such rotation in {architecture}")
    partial = float(stated.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0)
    found: Settings = {
        "rope_freq_base": float(stated["rope_theta"]),
        "rope_dimension_count": int(head_width(config) * partial),
    }
    windowed = (getattr(config, "rope_parameters", None) or {}).get(SLIDING) or {}
    if windowed:
        if (windowed.get("rope_type") or "default") != "default":
            raise ValueError(f"rope_type {windowed['rope_type']!r} of {SLIDING}, llama.cpp has 'default' built in")
        found["rope_freq_base_swa"] = float(windowed["rope_theta"])
    if kind in ("linear", "yarn"):
        found |= {"rope_scaling_type": kind, "rope_scaling_factor": float(stated["factor"])}
    if kind == "yarn":
        found |= _yarn(stated)
    return found | (_longrope(config, stated) if architecture == "phi3" else {})


def _yarn(stated: dict[str, Any]) -> Settings:
    found: Settings = {"rope_scaling_orig_ctx_len": int(stated["original_max_position_embeddings"])}
    for key in ("beta_fast", "beta_slow"):
        if stated.get(key):
            found[f"rope_scaling_yarn_{key}"] = float(stated[key])
    if stated.get("attention_factor") or stated.get("mscale") or stated.get("truncate") is False:
        raise ValueError("a yarn rotation with attention_factor, mscale or truncate, llama.cpp has the usual one built in")
    return found


def _longrope(config: Any, stated: dict[str, Any]) -> Settings:
    """phi3 needs its original context length always; long rotations scale attention by it."""
    longest = config.max_position_embeddings
    original = stated.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", longest)
    found: Settings = {"rope_scaling_orig_ctx_len": int(original)}
    if stated.get("rope_type") == "longrope":
        factor = longest / original
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        found |= {"rope_scaling_type": "longrope", "rope_scaling_attn_factors": stated.get("attention_factor") or usual}
    return found
