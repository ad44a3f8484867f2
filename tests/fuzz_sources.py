"""Valid files, as small as they can be, for the readers of fuzz_readers.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from archive_files import small_folder
from archive_files import write as write_archive
from safetensors.torch import save_file
from ternary_files import random_signs, write
from tiny_models import write_tokenizer

from compresskit.formats import peft

HIDDEN, WIDTH, VOCABULARY, BLOCKS = 8, 12, 259, 2
ROWS: list[dict[str, object]] = [
    {"instruction": "Add.", "input": "1 and 2", "output": "3", "source": "a"},
    {"instruction": "Say é.", "input": "", "output": "é"},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "source": "s"},
    {"messages": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}, {"from": "gpt", "value": "c"}]},
]
TASKS: list[dict[str, object]] = [
    {"question": "two and two", "choices": ["four", "five"], "answer": 0},
    {"question": "three", "choices": ["a", "b", "c"], "answer": 2},
]
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDTH,
    "num_hidden_layers": BLOCKS, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "dtype": "float32",
}  # fmt: skip


def write_json(path: Path, value: object) -> str:
    path.write_text(json.dumps(value))
    return path.name


def tensors(width: int = WIDTH) -> dict[str, torch.Tensor]:
    """The tensors of a tiny llama, each of ones."""
    found = {"model.embed_tokens.weight": torch.ones(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    for block in range(BLOCKS):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
        shapes |= {"mlp.gate_proj": (width, HIDDEN), "mlp.up_proj": (width, HIDDEN), "mlp.down_proj": (HIDDEN, width)}
        shapes |= {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,)}
        found |= {f"model.layers.{block}.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    return found


def llama(folder: Path, shards: int = 1, manifest: bool = False, width: int = WIDTH) -> str:
    """Write a tiny llama with a tokenizer; returns the name of its index, or of its weights."""
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG | {"intermediate_size": width})
    write_tokenizer(folder)
    weights = tensors(width)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        if manifest:
            digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
            write_json(folder / "compresskit.json", {"outputs": {"sha256": {"model.safetensors": digest}}, "source": None})
        return "model.safetensors"
    weight_map = {name: f"model-0000{index % shards}.safetensors" for index, name in enumerate(weights)}
    for file in set(weight_map.values()):
        save_file({name: weights[name] for name in weights if weight_map[name] == file}, folder / file)
    return write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})


def adapter(folder: Path, base: bool = False) -> str:
    """Write a LoRA adapter of two linears; returns the name of its weights."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    shapes = {names[0]: (HIDDEN, HIDDEN), names[1]: (WIDTH, HIDDEN)}
    ranks = dict(zip(names, (2, 3), strict=True))
    factors = {spec.name: torch.ones(spec.shape) for spec in peft.adapter_specs(ranks, shapes.__getitem__, "F32")}
    save_file(factors, folder / peft.WEIGHTS)
    write_json(folder / peft.CONFIG, peft.configuration("base", ranks) | {"alpha_pattern": {names[0]: 1, "mlp.*": 4}})
    if base:
        llama(folder / "base")
    return peft.WEIGHTS


def pruned_pair(folder: Path) -> str:
    """Write a llama, and what is left of it with eight channels of twelve; returns the name of its manifest."""
    llama(folder, width=8)
    llama(folder / "original")
    shutil.copyfile(folder / "tokenizer.json", folder / "original" / "tokenizer.json")
    facts = {"blocks": [{"kept_channels": [["ff0"]]} for _ in range(BLOCKS)]}
    link = {"stage": "prune", "inputs": {"sha256": {"model.safetensors": "00"}}, "facts": facts, "source": None}
    return write_json(folder / "compresskit.json", link)


def parquet_file(folder: Path, name: str) -> str:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 3), folder / name)
    return name


def ternary(folder: Path) -> str:
    """Write a ternary file of two tensors and a dense one."""
    write(folder / "file", {"first": random_signs(9000, 0.1, 1), "second": random_signs(500, 0.5, 2)})
    return "file"


def archive(folder: Path) -> str:
    """Write a packed folder."""
    small_folder(folder / "source")
    write_archive(folder / "source", folder / "file")
    return "file"


def packed(generator: np.random.Generator, shape: tuple[int, ...]) -> torch.Tensor:
    """Random 32-bit words."""
    return torch.from_numpy(generator.integers(-(1 << 31), 1 << 31, shape).astype(np.int32))
