"""Tiny random models of every family, each with a byte-level tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM

from compresskit.formats import peft
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.load import open_model

VOCABULARY = 259
BLOCKS = 3
WIDTH = 96

_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": BLOCKS}
_BASE = {"hidden_size": 32, "intermediate_size": WIDTH, "max_position_embeddings": 256, **_HEADS}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 8}

TINY_CONFIGS: dict[str, dict[str, object]] = {
    "llama": _BASE,
    "mistral": {**_BASE, "sliding_window": 16},
    "qwen2": _BASE,
    "qwen3": {**_BASE, "head_dim": 8},
    "smollm3": {**_BASE, "pad_token_id": 0},
    "gemma": {**_BASE, "head_dim": 8},
    "gemma2": {**_BASE, "head_dim": 8, "sliding_window": 16},
    "gemma3_text": {**_BASE, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi": _BASE,
    "phi3": {**_BASE, "pad_token_id": 0},
    "opt": {"hidden_size": 32, "ffn_dim": WIDTH, "word_embed_proj_dim": 32, "max_position_embeddings": 256, "num_attention_heads": 4, "num_hidden_layers": BLOCKS},
    "gpt2": {"n_embd": 32, "n_inner": WIDTH, "n_head": 4, "n_layer": BLOCKS, "n_positions": 256},
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "mixtral": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_BASE, **_MOE, "shared_expert_intermediate_size": WIDTH, "mlp_only_layers": [1]},
    "qwen3_moe": {**_BASE, **_MOE},
}  # fmt: skip
FAMILIES = tuple(ARCHITECTURES)
PACKED = tuple(family for family in FAMILIES if not ARCHITECTURES[family].transposed)
"""Families whose linears can be stored packed."""


def write_tokenizer(folder: Path, symbols: Sequence[str] = ()) -> None:
    """A byte-level tokenizer: one token a byte (or a symbol, if given), ids from 3 on; 0 pads, 1 begins, 2 ends."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    for symbol in symbols or sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


def make_model(folder: Path, family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """Write a tiny random checkpoint with norms and biases that are not trivial."""
    usual = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **{**usual, **TINY_CONFIGS[family], **changes})
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.1)
    network.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def make_adapter(folder: Path, base: Path, seed: int = 0, rank: int = 4, skip: int = 0) -> Path:
    """Write a random LoRA adapter of a tiny checkpoint's linears, but for the first `skip`."""
    model = open_model(base)
    names = model.linears[skip:]
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in names:
        rows, columns = model.linear_shape(name)
        for factor, shape in zip(peft.factor_names(name), ((rank, columns), (rows, rank)), strict=True):
            tensors[factor] = torch.randn(shape, generator=generator)
    folder.mkdir(parents=True)
    save_file(tensors, folder / peft.WEIGHTS)
    (folder / peft.CONFIG).write_text(peft.config_text(str(base), dict.fromkeys(names, rank)))
    return folder
