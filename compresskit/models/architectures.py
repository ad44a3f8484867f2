"""THE table of model families: the module paths of their blocks, attention and feed-forward networks.

A *sublayer* consists of the linears that read the residual stream (`in_projections`) and the one that writes to it
(`out_projection`). No other file of this package names a module of a model.

Names are *plain* names: the module names of transformers, with one set of linears per expert. `Model.stored_name`
(model.py) maps a plain name to the name in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass

RAGGED_PREFIX = "compresskit_"
"""Prefix of the `model_type` of checkpoints with per-block widths (see layouts.py)."""
HEAD = "lm_head"
"""Module path of the output embedding, in every family."""


@dataclass(frozen=True)
class Sublayer:
    """Names of linears inside a block; `{expert}` stands for the expert's number."""

    in_projections: tuple[str, ...]
    out_projection: str
    width_key: str = ""
    """Key of config.json with the width of the feed-forward network."""
    fused: int = 1
    """Number of equal row groups in an input projection (2 if gate and up share one matrix)."""


@dataclass(frozen=True)
class Architecture:
    """One model family."""

    blocks: str
    """Module path of the list of blocks."""
    attention: Sublayer
    ffns: tuple[Sublayer, ...]
    """Kinds of feed-forward network that a block can have; a block has those whose weights are stored."""
    embedding: str = "model.embed_tokens"
    """Module path of the token embedding."""
    hidden_key: str = "hidden_size"
    count_key: str = "num_hidden_layers"
    transposed: bool = False
    """Whether weights are stored as (in, out), like GPT-2's Conv1D."""
    renames: tuple[tuple[str, str], ...] = ()
    """(plain, stored) name parts inside a block."""
    outer_renames: tuple[tuple[str, str], ...] = ()
    """(plain, stored) name parts outside the blocks."""
    experts: str = ""
    """Module path of the experts inside a block."""
    ffn_bias_key: str = ""
    """Key of config.json that adds a bias to every linear of the feed-forward network."""
    aliases: tuple[tuple[str, int], ...] = ()
    """(config key, multiple of the hidden size) for widths that a config may omit."""


_ATTENTION = Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj")
_GATED = Sublayer(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size")


def _experts(width_key: str) -> Sublayer:
    path = "mlp.experts.{expert}."
    return Sublayer((path + "gate_proj", path + "up_proj"), path + "down_proj", width_key)


_LLAMA = Architecture("model.layers", _ATTENTION, (_GATED,))
_LLAMA_WITH_BIAS_KEY = Architecture("model.layers", _ATTENTION, (_GATED,), ffn_bias_key="mlp_bias")
_QWEN_MOE_SHARED = Sublayer(
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_expert.down_proj",
    "shared_expert_intermediate_size",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA_WITH_BIAS_KEY,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA_WITH_BIAS_KEY,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": Architecture(
        "model.layers",
        Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),
        (Sublayer(("mlp.fc1",), "mlp.fc2", "intermediate_size"),),
    ),
    "phi3": Architecture(
        "model.layers",
        Sublayer(("self_attn.qkv_proj",), "self_attn.o_proj", fused=3),
        (Sublayer(("mlp.gate_up_proj",), "mlp.down_proj", "intermediate_size", fused=2),),
    ),
    "opt": Architecture(
        "model.decoder.layers",
        Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
        (Sublayer(("fc1",), "fc2", "ffn_dim"),),
        embedding="model.decoder.embed_tokens",
    ),
    "gpt2": Architecture(
        "transformer.h",
        Sublayer(("attn.c_attn",), "attn.c_proj", fused=3),
        (Sublayer(("mlp.c_fc",), "mlp.c_proj", "n_inner"),),
        embedding="transformer.wte",
        hidden_key="n_embd",
        count_key="n_layer",
        transposed=True,
        aliases=(("n_inner", 4),),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        Sublayer(("attention.query_key_value",), "attention.dense", fused=3),
        (Sublayer(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size"),),
        embedding="gpt_neox.embed_in",
        outer_renames=((HEAD, "embed_out"),),
    ),
    "mixtral": Architecture(
        "model.layers",
        _ATTENTION,
        (_experts("intermediate_size"),),
        renames=(("mlp.", "block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
        experts="mlp.experts",
    ),
    "qwen2_moe": Architecture(
        "model.layers",
        _ATTENTION,
        (_GATED, _experts("moe_intermediate_size"), _QWEN_MOE_SHARED),
        experts="mlp.experts",
    ),
    "qwen3_moe": Architecture("model.layers", _ATTENTION, (_GATED, _experts("moe_intermediate_size")), experts="mlp.experts"),
}
