"""The families that llama.cpp runs as transformers does, and what it calls them and their settings.

A setting of config.json that llama.cpp has built in otherwise is refused: the file would load, and answer something else.
Sources: the loaders and graphs in src/models of llama.cpp, build 11434; benchmarks/gguf_files.py compares every family's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from compresskit.errors import UnsupportedArchitecture
from compresskit.models.model import Model

ATTENDING_TO_ALL = "sliding window of {window} tokens: llama.cpp attends to all tokens in this architecture"
FULL = "full_attention"
SLIDING = "sliding_attention"
Settings = dict[str, Any]
"""By name of the GGUFWriter's method, without `add_`."""


@dataclass(frozen=True)
class Family:
    """What llama.cpp has built in for one model type."""

    architecture: str
    paired: bool = False
    """Whether it rotates neighbouring channels of queries and keys (placement.py)."""
    per_block: str = ""
    """Architecture that runs the same blocks with a width of its own for each."""
    norm_offset: float = 0.0
    """What transformers adds to a norm's weight on the fly."""
    activations: tuple[str, ...] = ("silu",)
    """Names of the activation function that is built in."""
    tied: bool | None = None
    """Whether the head must be the embedding (True) or a matrix of its own (False)."""
    own: Callable[[Any], Settings] = field(default=lambda config: {})
    """Settings of this family alone, from its configuration; raises ValueError for what llama.cpp has otherwise."""


def _no_biases(config: Any) -> Settings:
    for key in ("attention_bias", "mlp_bias"):
        if getattr(config, key, False):
            raise ValueError(f"{key} is True, llama.cpp has no such biases in this architecture")
    return {}


def _gemma2(config: Any) -> Settings:
    _no_biases(config)
    _expect(config, "query_pre_attn_scalar", _scored_width(config, 46))
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not getattr(config, key):
            raise ValueError(f"{key} is {getattr(config, key)!r}, llama.cpp always caps")
    return {
        "sliding_window": config.sliding_window,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
        **_pattern(config, 2),
    }


def _gemma3(config: Any) -> Settings:
    _no_biases(config)
    _expect(config, "query_pre_attn_scalar", _scored_width(config, 62))
    _expect(config, "attn_logit_softcapping", None)
    capped = config.final_logit_softcapping
    return {
        "sliding_window": config.sliding_window,
        **({"final_logit_softcapping": capped} if capped else {}),
        **_pattern(config, 6),
    }


def _scored_width(config: Any, blocks_of_largest: int) -> float:
    """What llama.cpp divides attention scores by the root of: the head's width, in the largest model another."""
    largest = config.num_hidden_layers == blocks_of_largest
    return float(config.hidden_size // config.num_attention_heads if largest else config.head_dim)


def _pattern(config: Any, every: int) -> Settings:
    """Which blocks attend to a window; nothing where it is llama.cpp's own: all but every so many."""
    windowed = [kind == SLIDING for kind in config.layer_types]
    usual = [(index + 1) % every != 0 for index in range(len(windowed))]
    return {} if windowed == usual else {"sliding_window_pattern": windowed}


def _smollm3(config: Any) -> Settings:
    _no_biases(config)
    _expect(config, "no_rope_layers", [int((index + 1) % 4 != 0) for index in range(config.num_hidden_layers)])
    return {}


def _gpt2(config: Any) -> Settings:
    _expect(config, "scale_attn_weights", True)
    _expect(config, "scale_attn_by_inverse_layer_idx", False)
    return {}


def _granite(config: Any) -> Settings:
    return {
        "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "attention_scale": float(config.attention_multiplier),
        "logit_scale": float(config.logits_scaling),
        **_no_biases(config),
    }


def _stablelm(config: Any) -> Settings:
    _expect(config, "qk_layernorm", False)
    return {"parallel_residual": bool(config.use_parallel_residual)}


def _seed_oss(config: Any) -> Settings:
    _expect(config, "attention_out_bias", False)
    _expect(config, "mlp_bias", False)
    return {}


def _ernie(config: Any) -> Settings:
    _expect(config, "use_bias", False)
    return {}


def _starcoder2(config: Any) -> Settings:
    _expect(config, "use_bias", True)
    return {}


def _cohere(config: Any) -> Settings:
    _expect(config, "use_qk_norm", False)
    return {"logit_scale": float(config.logit_scale), **_no_biases(config)}


def _phi(config: Any) -> Settings:
    _expect(config, "qk_layernorm", False)
    return {}


def _expect(config: Any, key: str, expected: object) -> None:
    found = getattr(config, key)
    if found != expected:
        raise ValueError(f"{key} is {found!r}, llama.cpp has {expected!r} built in")


_GELU = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", paired=True, per_block="deci"),
    "mistral": Family("llama", paired=True, per_block="deci"),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3", own=_no_biases),
    "smollm3": Family("smollm3", paired=True, own=_smollm3),
    "gemma": Family("gemma", norm_offset=1.0, activations=_GELU, tied=True, own=_no_biases),
    "gemma2": Family("gemma2", norm_offset=1.0, activations=_GELU, tied=True, own=_gemma2),
    "gemma3_text": Family("gemma3", norm_offset=1.0, activations=_GELU, own=_gemma3),
    "phi": Family("phi2", activations=_GELU, tied=False, own=_phi),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2", activations=_GELU, own=_gpt2),
    "granite": Family("granite", paired=True, own=_granite),
    "arcee": Family("arcee", paired=True, activations=("relu2",), own=_no_biases),
    "olmo2": Family("olmo2", own=_no_biases),
    "seed_oss": Family("seed_oss", own=_seed_oss),
    "stablelm": Family("stablelm", own=_stablelm),
    "cohere": Family("command-r", tied=True, own=_cohere),
    "glm4": Family("glm4"),
    "ernie4_5": Family("ernie4_5", own=_ernie),
    "nemotron": Family("nemotron", norm_offset=1.0, activations=("relu2",), own=_no_biases),
    "starcoder2": Family("starcoder2", activations=_GELU, own=_starcoder2),
}


def family_of(model: Model) -> Family:
    """The family's row; raises UnsupportedArchitecture if it has none."""
    if model.family not in FAMILIES:
        raise UnsupportedArchitecture(
            f"{model.family}: is not exported to GGUF; known are {', '.join(FAMILIES)}. Try convert_hf_to_gguf.py of llama.cpp"
        )
    return FAMILIES[model.family]


def architecture_of(model: Model) -> str:
    """What llama.cpp calls a model: blocks of different widths are another architecture where there is one."""
    family = family_of(model)
    widths = {model.ffn_groups(index)[0].width for index in range(model.block_count)}
    return family.per_block if family.per_block and len(widths) > 1 else family.architecture
