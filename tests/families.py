"""A tiny random checkpoint of every model type, made by the classes of stock transformers.

`python tests/families.py OUT_FOLDER [types...]` writes each under OUT_FOLDER/<type>, reads it back through its auto class
and prints a line for each: what the reader missed, whether the logits are alive, whether they are those of the written model.
"""

from __future__ import annotations

import copy
import logging
import math
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

Overrides = dict[str, Any]

VOCABULARY = 128
WIDTH = 64
INNER = 128

_IDS: Overrides = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN: Overrides = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, **_IDS}
_HEADS: Overrides = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
_BASE: Overrides = {**_PLAIN, **_HEADS, "intermediate_size": INNER, "max_position_embeddings": 256}
_BASE16: Overrides = {**_BASE, "head_dim": 16}
"""Most families: three blocks of four heads, two of them of keys and values."""
_FOUR: Overrides = {**_BASE, "num_hidden_layers": 4}

_SLIDING3: Overrides = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_SLIDING4: Overrides = {
    "sliding_window": 8,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}
_LINEAR3: Overrides = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}

_LOCAL: Overrides = {"num_local_experts": 4, "num_experts_per_tok": 2}
_EXPERTS: Overrides = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_ROUTED: Overrides = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT: Overrides = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
"""Multi-head latent attention; its keys and values have a head for each of the queries'."""
_DELTA: Overrides = {
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
"""Gated delta networks between blocks of gated attention; a quarter of each head of 32 is rotated."""
_MAMBA2: Overrides = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
}
_TIED: Overrides = {"tie_word_embeddings": True}
"""Of families whose releases are all tied though their class's default is not."""
_GRANITE: Overrides = {
    **_TIED,
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}
_GPT: Overrides = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": INNER,
    "n_positions": 256,
    **_IDS,
}

_MROPE: Overrides = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
_MROPE_HALF: Overrides = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
}
_MROPE_QUARTER: Overrides = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]}
}
_TOWER: Overrides = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGLIP: Overrides = {**_TOWER, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False}
_QWEN_TOWER: Overrides = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 14,
    "out_hidden_size": WIDTH,
}
_QWEN_TOKENS: Overrides = {
    "image_token_id": 120,
    "video_token_id": 121,
    "vision_start_token_id": 122,
    "vision_end_token_id": 123,
}
_PERCEIVER: Overrides = {"num_position_embeddings": 16}

_QWEN3_5: Overrides = {**_BASE, **_DELTA, **_LINEAR3, **_MROPE_QUARTER}
_QWEN3_5_MOE: Overrides = {**_QWEN3_5, **_EXPERTS, "shared_expert_intermediate_size": 64}
_LLAMA4: Overrides = {
    **_BASE16,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "intermediate_size_mlp": INNER,
    **_LOCAL,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8,
}
_LFM2: Overrides = {
    **_BASE,
    "intermediate_size": 192,
    "block_multiple_of": 32,
    "layer_types": ["conv", "full_attention", "conv"],
}
"""Two thirds of the inner width, rounded up to a multiple of 32, are what its feed-forwards have."""
_GEMMA4: Overrides = {
    **_BASE16,
    **_SLIDING4,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "global_head_dim": 32,
    "final_logit_softcapping": 30.0,
}

TINY: dict[str, Overrides] = {
    "apertus": {
        **_BASE,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 12000000.0,
            "factor": 8.0,
            "original_max_position_embeddings": 128,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "arcee": _BASE16,
    "bamba": {**_BASE, **_MAMBA2, "attn_layer_indices": [1]},
    "bitnet": {**_BASE, **_TIED},
    "bloom": {**_PLAIN, "n_layer": 3, "n_head": 4},
    "codegen": {**_GPT, "n_ctx": 256, "rotary_dim": 8},
    "cohere": _BASE,
    "cohere2": {**_BASE16, **_SLIDING4},
    "dbrx": {
        "vocab_size": VOCABULARY,
        **_IDS,
        "d_model": WIDTH,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 500000.0},
        "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": INNER, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {**_BASE, **_LATENT, **_ROUTED, "first_k_dense_replace": 1},
    "deepseek_v3": {**_BASE, **_LATENT, **_ROUTED, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "deepseek_v32": {
        **_BASE,
        **_LATENT,
        **_ROUTED,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "index_topk": 8,
        "index_head_dim": 32,
        "index_n_heads": 2,
    },
    "dots1": {**_BASE, **_ROUTED, "first_k_dense_replace": 1},
    "ernie4_5": _BASE16,
    "ernie4_5_moe": {
        **_BASE,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": 64,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "exaone4": {**_BASE, **_SLIDING4},
    "falcon": {**_PLAIN, "num_hidden_layers": 3, "num_attention_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": INNER},
    "falcon_h1": {
        **_BASE,
        **_MAMBA2,
        "mamba_d_ssm": 128,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "mlp_multipliers": [0.8, 0.5],
        "key_multiplier": 0.5,
        "attention_out_multiplier": 0.9,
        "ssm_multipliers": [0.7, 0.5, 0.4, 0.5, 0.6],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.8,
    },
    "gemma3": {
        "text_config": {**_BASE16, **_SLIDING3, "query_pre_attn_scalar": 16},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "boi_token_index": 120,
        "eoi_token_index": 121,
        "image_token_index": 122,
    },
    "gemma3n_text": {
        **_BASE16,
        **_SLIDING4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "intermediate_size": [INNER] * 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32,
        "num_kv_shared_layers": 2,
        "laurel_rank": 32,
    },
    "gemma4": {
        "text_config": {
            **_GEMMA4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
        "vision_config": {
            **_TOWER,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "pooling_kernel_size": 1,
            "patch_size": 14,
            "position_embedding_size": 16,
        },
        "boi_token_id": 120,
        "eoi_token_id": 121,
        "image_token_id": 122,
        "video_token_id": 123,
        "boa_token_id": 124,
        "eoa_token_index": 125,
        "audio_token_id": 126,
    },
    "gemma4_text": {
        **_GEMMA4,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 64,
    },
    "glm": _BASE16,
    "glm4": _BASE16,
    "glm4_moe": {**_BASE, **_ROUTED, "first_k_dense_replace": 1, "head_dim": 16},
    "glm4_moe_lite": {**_BASE, **_LATENT, **_ROUTED, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "glm4v": {
        "text_config": {**_BASE, **_MROPE_HALF},
        "vision_config": {**_QWEN_TOWER, "image_size": 28},
        "image_token_id": 120,
        "video_token_id": 121,
        "image_start_token_id": 122,
        "image_end_token_id": 123,
        "video_start_token_id": 124,
        "video_end_token_id": 125,
    },
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        **_PLAIN,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": 256,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "gpt_oss": {**_BASE16, **_LOCAL, **_SLIDING3},
    "gptj": {**_GPT, "rotary_dim": 8},
    "granite": {**_BASE, **_GRANITE},
    "granitemoe": {**_BASE, **_GRANITE, **_LOCAL, "intermediate_size": 64},
    "granitemoehybrid": {
        **_BASE,
        **_GRANITE,
        **_LOCAL,
        **_MAMBA2,
        **_LINEAR3,
        "intermediate_size": 64,
        "shared_intermediate_size": INNER,
    },
    "granitemoeshared": {**_BASE, **_GRANITE, **_LOCAL, "intermediate_size": 64, "shared_intermediate_size": INNER},
    "helium": _BASE16,
    "hunyuan_v1_dense": {**_BASE16, **_TIED},
    "hunyuan_v1_moe": {**_BASE16, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_BASE16, **_EXPERTS, "mlp_layer_types": ["dense", "sparse", "sparse"]},
    "internlm3": _BASE16,
    "internvl": {
        "text_config": {**_BASE, "model_type": "qwen2"},
        "vision_config": {**_TOWER, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_token_id": 120,
        "image_seq_length": 1,
    },
    "jamba": {
        **_FOUR,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 32,
    },
    "kimi_linear": {
        **_BASE,
        **_LATENT,
        **_LINEAR3,
        "num_experts": 4,
        "num_shared_experts": 1,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 64,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "linear_head_dim": 32,
        "linear_num_heads": 4,
    },
    "lfm2": _LFM2,
    "lfm2_moe": {**_BASE, **_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_vl": {
        "text_config": {**_LFM2, "model_type": "lfm2"},
        "vision_config": {
            **_TOWER,
            "model_type": "siglip2_vision_model",
            "patch_size": 14,
            "num_patches": 4,
            "vision_use_head": False,
        },
        "image_token_id": 120,
        "projector_hidden_size": WIDTH,
    },
    "llama4": {
        "text_config": _LLAMA4,
        "vision_config": {
            **_TOWER,
            "intermediate_size": 128,
            "image_size": 28,
            "patch_size": 14,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
        },
        "boi_token_index": 120,
        "eoi_token_index": 121,
        "image_token_index": 122,
    },
    "llama4_text": _LLAMA4,
    "llava": {
        "text_config": {**_BASE16, "model_type": "llama"},
        "vision_config": {
            **_TOWER,
            "model_type": "clip_vision_model",
            "num_hidden_layers": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_index": 120,
        "image_seq_length": 4,
    },
    "mamba": {**_PLAIN, "num_hidden_layers": 3, "state_size": 16, "time_step_rank": 32},
    "mamba2": {
        **_PLAIN,
        "num_hidden_layers": 3,
        "state_size": 16,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "time_step_rank": 32,
    },
    "minicpm3": {**_BASE, **_LATENT, "dim_model_base": 32, "head_dim": 16},
    "minimax": {
        **_FOUR,
        **_LOCAL,
        "head_dim": 16,
        "intermediate_size": 64,
        "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
        "block_size": 8,
        "full_attn_alpha_factor": 3.5,
        "linear_attn_alpha_factor": 3.5,
        "mlp_alpha_factor": 3.5,
    },
    "minimax_m2": {**_BASE16, **_LOCAL, "intermediate_size": 64},
    "ministral": {**_BASE16, **_SLIDING3},
    "ministral3": {
        **_BASE16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            "original_max_position_embeddings": 16,
            "max_position_embeddings": 256,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale_all_dim": 1.0,
            "mscale": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    "mistral3": {
        "text_config": {**_BASE16, "model_type": "mistral"},
        "vision_config": {**_TOWER, "model_type": "pixtral", "head_dim": 16, "image_size": 28, "patch_size": 14},
        "image_token_index": 120,
    },
    "mllama": {
        "text_config": {**_FOUR, "cross_attention_layers": [1]},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "max_num_tiles": 1,
            "supported_aspect_ratios": [[1, 1]],
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
        },
        "image_token_index": VOCABULARY,
    },
    "mpt": {
        "vocab_size": VOCABULARY,
        **_IDS,
        "d_model": WIDTH,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 256,
    },
    "nemotron": _BASE16,
    "nemotron_h": {
        **_PLAIN,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "intermediate_size": INNER,
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 8,
        **_ROUTED,
        "moe_shared_expert_intermediate_size": 64,
    },
    "olmo": _BASE,
    "olmo2": _BASE,
    "olmo3": {**_BASE, **_SLIDING4},
    "olmo_hybrid": {
        **_BASE,
        **_LINEAR3,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 32,
    },
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "paligemma": {
        "text_config": {**_BASE16, "model_type": "gemma", "num_image_tokens": 4},
        "vision_config": {**_SIGLIP, "projection_dim": WIDTH},
        "projection_dim": WIDTH,
        "hidden_size": WIDTH,
        "image_token_index": 120,
    },
    "persimmon": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "phimoe": {**_BASE, **_LOCAL, "intermediate_size": 64, "attention_bias": True, "lm_head_bias": True},
    "qwen2_5_vl": {
        "text_config": {**_BASE, **_MROPE},
        "vision_config": {**_QWEN_TOWER, "window_size": 28, "fullatt_block_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen2_vl": {
        "text_config": {**_BASE, **_MROPE},
        "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "mlp_ratio": 1, "num_heads": 2, "patch_size": 14},
        **_QWEN_TOKENS,
    },
    "qwen3_5": {"text_config": _QWEN3_5, "vision_config": {**_QWEN_TOWER, **_PERCEIVER}, **_QWEN_TOKENS},
    "qwen3_5_moe": {"text_config": _QWEN3_5_MOE, "vision_config": {**_QWEN_TOWER, **_PERCEIVER}, **_QWEN_TOKENS},
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_next": {
        **_BASE,
        **_DELTA,
        **_LINEAR3,
        **_EXPERTS,
        "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [0],
    },
    "qwen3_vl": {
        "text_config": {**_BASE16, **_MROPE},
        "vision_config": {**_QWEN_TOWER, **_PERCEIVER, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl_moe": {
        "text_config": {**_BASE16, **_MROPE, **_LOCAL, "moe_intermediate_size": 64, "mlp_only_layers": [0]},
        "vision_config": {**_QWEN_TOWER, **_PERCEIVER, "deepstack_visual_indexes": [0]},
        **_QWEN_TOKENS,
    },
    "recurrent_gemma": {
        **_PLAIN,
        **_HEADS,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 256,
        "lru_width": 2 * WIDTH,
        "attention_window_size": 8,
    },
    "seed_oss": _BASE16,
    "smolvlm": {
        "text_config": {**_BASE16, "model_type": "llama"},
        "vision_config": {**_TOWER, "image_size": 28, "patch_size": 14},
        "image_token_id": 120,
        "pad_token_id": 0,
    },
    "stablelm": _BASE,
    "starcoder2": _BASE,
    "llama": _BASE16,
    "mistral": {**_BASE16, "sliding_window": 8},
    "qwen2": _BASE,
    "qwen3": _BASE16,
    "smollm3": {**_BASE, "num_hidden_layers": 4},
    "gemma": _BASE16,
    "gemma2": {**_BASE16, **_SLIDING3, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_BASE16, **_SLIDING3, "query_pre_attn_scalar": 16},
    "phi": _BASE,
    "phi3": {**_BASE, "original_max_position_embeddings": 256},
    "opt": {
        **_PLAIN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": INNER,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": 256,
    },
    "gpt2": _GPT,
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "mixtral": {**_BASE16, **_LOCAL, "intermediate_size": 64},
    "qwen2_moe": {**_BASE, **_EXPERTS, "shared_expert_intermediate_size": INNER, "mlp_only_layers": [0]},
    "qwen3_moe": {**_BASE16, **_LOCAL, "moe_intermediate_size": 64, "mlp_only_layers": [0]},
}
"""Model type -> what its configuration class is given; the rest is the class's own default."""

HELD_OUT: dict[str, Overrides] = {
    "biogpt": {
        **_PLAIN,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": INNER,
        "max_position_embeddings": 256,
    },
    "diffllama": _BASE16,
    "doge": {**_BASE, "is_moe": False},
    "falcon_mamba": {**_PLAIN, "num_hidden_layers": 3, "state_size": 16, "time_step_rank": 32},
    "flex_olmo": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 64},
    "jetmoe": {
        **_PLAIN,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "intermediate_size": 64,
        **_LOCAL,
        "max_position_embeddings": 256,
    },
    "longcat_flash": {
        **_PLAIN,
        **_LATENT,
        "num_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "ffn_hidden_size": INNER,
        "expert_ffn_hidden_size": 64,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "nanochat": _BASE,
}
"""Types that nobody looked at while the readers were written."""

CANNOT: dict[str, str] = {}
"""Types that stock transformers does not make here, and why."""

_IMAGE_TEXT = frozenset(
    {
        "gemma3",
        "gemma4",
        "glm4v",
        "internvl",
        "lfm2_vl",
        "llama4",
        "llava",
        "mistral3",
        "mllama",
        "paligemma",
        "qwen2_5_vl",
        "qwen2_vl",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_vl",
        "qwen3_vl_moe",
        "smolvlm",
    }
)
AUTO_CLASS: dict[str, str] = {
    name: "AutoModelForImageTextToText" if name in _IMAGE_TEXT else "AutoModelForCausalLM" for name in (*TINY, *HELD_OUT)
}
"""The auto class of the architecture that this type's real checkpoints name."""


SAMPLE = (
    "llama", "apertus", "bloom", "deepseek_v3", "falcon_h1", "gemma3", "gemma3n_text", "gemma4", "gpt2", "gpt_oss", "granitemoe",
    "kimi_linear", "lfm2", "mamba", "minimax", "mixtral", "paligemma", "qwen3_5_text", "qwen3_vl_moe",
)  # fmt: skip
"""One type of every kind of structure, for tests; benchmarks/family_table.py runs all."""


def auto_class(model_type: str) -> Any:
    return {"AutoModelForCausalLM": AutoModelForCausalLM, "AutoModelForImageTextToText": AutoModelForImageTextToText}[
        AUTO_CLASS[model_type]
    ]


def config_of(model_type: str) -> PreTrainedConfig:
    overrides = TINY[model_type] if model_type in TINY else HELD_OUT[model_type]
    return AutoConfig.for_model(model_type, **copy.deepcopy(overrides))


_AROUND_STOCK = ("A_log", "D", "dt_bias", "recurrent_param")
"""Parameters of several dimensions whose range has a meaning."""
_DERIVED = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
"""Stored buffers of MiniMax's lightning attention that must agree: the configuration gives them."""


def _random(module: torch.nn.Module, name: str, old: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """New values: vectors near the stock ones, matrices of unit gain, tables of a half."""
    noise = torch.randn(old.shape, generator=generator)
    if name in _DERIVED:
        return old
    if name == "eps":  # of an activation, where a tenth would be another function
        return old * (1 + 0.1 * noise)
    if old.dim() < 2 or name in _AROUND_STOCK or name.endswith("bias"):
        return old + 0.1 * noise
    if isinstance(module, torch.nn.Embedding):
        return 0.5 * noise
    kind = type(module).__name__
    if kind == "Conv1D":
        inputs = old.shape[0]
    elif isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)):
        inputs = math.prod(old.shape[1:])
    elif old.dim() == 3 and (kind.startswith(("GptOss", "Llama4")) or getattr(module, "is_transposed", False)):
        inputs = old.shape[1]
    else:
        inputs = old.shape[-1]
    return noise / math.sqrt(inputs)


def _stored(network: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, str, torch.Tensor]]:
    """Each parameter and persistent floating buffer, once."""
    seen: set[int] = set()
    for module in network.modules():
        passing = module._non_persistent_buffers_set
        buffers = [(name, buffer) for name, buffer in module.named_buffers(recurse=False) if name not in passing]
        for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
            if id(tensor) not in seen and tensor.is_floating_point():
                seen.add(id(tensor))
                yield module, name, tensor


def make(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The stock model with random weights, none of them constant."""
    auto = auto_class(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: PreTrainedModel = auto.from_config(config_of(model_type), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module, name, tensor in _stored(network):
            tensor.copy_(_random(module, name, tensor, generator))
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{model_type}: {type(module).__name__}.{name} is not finite")
    if dtype == torch.float32:
        return network
    with tempfile.TemporaryDirectory() as folder:  # the reader knows what its class keeps in float32
        network.save_pretrained(folder)
        return auto.from_pretrained(folder, dtype=dtype).eval()


def _as_published(model_type: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file that transformers wrote, as the type's real files have them; transformers reads both.

    Writing undoes what reading did to the names and the parts, but not always well: it calls Kimi Linear's dense
    feed-forwards mixtures, and cuts OLMo Hybrid's convolution into three equal parts. Qwen3.5's experts are published in one
    tensor for all, and written in one for each.
    """
    if model_type == "kimi_linear":
        return {re.sub(r"block_sparse_moe\.(\w+_proj)", r"mlp.\1", name): tensor for name, tensor in tensors.items()}
    out = dict(tensors)
    if model_type == "olmo_hybrid":
        for name in [name for name in tensors if name.endswith("q_conv1d.weight")]:
            parts = [name.replace("q_conv1d", f"{part}_conv1d") for part in "qkv"]
            rows = [tensors[name.replace("q_conv1d", f"{part}_proj")].shape[0] for part in "qkv"]
            whole = torch.cat([tensors[part] for part in parts])
            out.update(zip(parts, (part.clone() for part in torch.split(whole, rows)), strict=True))
    if model_type == "qwen3_5_moe":
        for block in sorted({name.partition(".experts.")[0] for name in tensors if ".experts." in name}):
            each = [f"{block}.experts.{number}" for number in range(4)]
            gate, up, down = (
                torch.stack([out.pop(f"{expert}.{part}_proj.weight") for expert in each]) for part in ("gate", "up", "down")
            )
            out |= {f"{block}.experts.gate_up_proj": torch.cat((gate, up), 1), f"{block}.experts.down_proj": down}
    return out


def write(network: PreTrainedModel, folder: Path) -> Path:
    """Write the model's checkpoint into the folder."""
    network.save_pretrained(folder)
    model_type, file = network.config.model_type, folder / "model.safetensors"
    if model_type in ("kimi_linear", "olmo_hybrid", "qwen3_5_moe"):
        tensors = load_file(file)
        save_file(_as_published(model_type, tensors), file, metadata={"format": "pt"})
    return folder


def build(model_type: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write the type's tiny checkpoint into the folder."""
    return write(make(model_type, seed, dtype), folder)


def logits_of(network: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """What the model says to twelve random tokens.

    Llama4ForConditionalGeneration of 5.24 cannot be called: it hands on images that its language model does not return. Its
    language model is asked instead.
    """
    speaker = network.language_model if type(network).__name__ == "Llama4ForConditionalGeneration" else network
    tokens = torch.randint(3, 100, (1, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits: torch.Tensor = speaker(input_ids=tokens, use_cache=False).logits
    return logits


def check(model_type: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    """Write the type's checkpoint, read it back and say what is wrong with it, or 'ok'."""
    network = make(model_type, dtype=dtype)
    write(network, folder)
    expected = logits_of(network)
    again, report = auto_class(model_type).from_pretrained(folder, dtype=dtype, output_loading_info=True)
    found = logits_of(again.eval())
    wrong = [f"{name}: {sorted(keys)}" for name, keys in report.items() if keys]
    if type(again) is not type(network):
        wrong.append(f"read as a {type(again).__name__}")
    if not torch.isfinite(found).all() or found.std() <= 1e-3:
        wrong.append(f"logits of a standard deviation of {found.std().item():.2e}")
    if not torch.equal(found, expected):
        wrong.append(f"logits differ by {(found - expected).abs().max().item():.2e}")
    return "; ".join(wrong) or f"ok ({type(again).__name__}, {again.num_parameters()} parameters, std {found.std().item():.2f})"


def main(arguments: list[str]) -> int:
    if not arguments:
        print("python tests/families.py OUT_FOLDER [types...]")  # noqa: T201
        return 2
    logging.getLogger("transformers").setLevel(logging.ERROR)
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    failures = 0
    for model_type in arguments[1:] or [name for name in AUTO_CLASS if name not in CANNOT]:
        temporary = out / f".{model_type}.part"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            verdict = check(model_type, temporary)
            shutil.rmtree(out / model_type, ignore_errors=True)
            temporary.rename(out / model_type)
        except Exception as error:
            verdict = f"{type(error).__name__}: {error}"
        failures += not verdict.startswith("ok")
        print(f"{model_type}: {verdict}", flush=True)  # noqa: T201
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
