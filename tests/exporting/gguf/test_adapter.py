"""exporting/gguf/adapter.py: alpha / rank * B A of the file is peft's scaling * B A. Oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from gguf_files import keys_of, kinds_of, tensors_of
from safetensors.torch import load_file, save_file
from tiny_models import make_adapter

from compresskit.formats import peft
from compresskit.models.load import open_any

CONFIGS: dict[str, dict[str, Any]] = {
    "as written": {},
    "one alpha": {"lora_alpha": 16},
    "root of the rank": {"use_rslora": True, "lora_alpha": 6},
    "alphas that differ": {"alpha_pattern": {"up_proj": 3.0, "layers.1.mlp.down_proj": 0.25}},
    "no effect": {"lora_alpha": 0},
    "from the weights of the base": {"init_lora_weights": "pissa", "lora_alpha": 3},
}
HEADS = {"attn_q": 4, "attn_k": 2}
SHORT = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "gate_proj": "ffn_gate",
    "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def update_in_file(path: Path, name: str) -> torch.Tensor:
    """What llama.cpp adds to a weight: it takes an alpha of 0 for a scale of 1."""
    found, alpha = tensors_of(path), keys_of(path)["adapter.lora.alpha"]
    first, second = (found[f"{name}.weight.lora_{side}"] for side in "ab")
    return (alpha / first.shape[0] if alpha else 1.0) * second @ first


@pytest.mark.parametrize("case", [*CONFIGS, "8 bits", "ranks that differ"])
def test_updates_are_the_adapter_s_own(case: str, tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny["llama"])
    config = json.loads((adapter / peft.CONFIG).read_text()) | CONFIGS.get(case, {})
    tensors = load_file(adapter / peft.WEIGHTS)
    if case == "8 bits":
        tensors = {name: (tensor * 50).to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
        config["alpha_pattern"] = {"self_attn.q_proj": 0.002, "mlp.up_proj": 0.001}
    if case == "ranks that differ":
        for side, cut in (("A", slice(2)), ("B", (slice(None), slice(2)))):
            name = f"{peft.PREFIX}model.layers.0.mlp.up_proj.lora_{side}.weight"
            tensors[name] = tensors[name][cut].contiguous()
        config["rank_pattern"] = {"layers.0.mlp.up_proj": 2}
    save_file(tensors, adapter / peft.WEIGHTS)
    (adapter / peft.CONFIG).write_text(json.dumps(config))
    code, out, _ = run("export", "gguf", adapter, tmp_path / "a.gguf", "--json")
    assert code == 0
    result, opened = json.loads(out), open_any(str(adapter)).adapter
    assert opened is not None
    assert (result["exact"], result["method"], result["architecture"]) == (True, "gguf", "llama")
    for linear in opened.names:
        block, short = linear.split(".")[2], SHORT[linear.rpartition(".")[2]]
        wanted = opened.update(linear)
        if short in HEADS:
            wanted = wanted.view(HEADS[short], 2, -1, wanted.shape[1]).transpose(1, 2).reshape(wanted.shape)
        found = update_in_file(tmp_path / "a.gguf", f"blk.{block}.{short}")
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_factors_whose_scalings_fit_one_alpha_stay_as_they_are(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny["qwen2"])
    stored = {name: tensor.half() for name, tensor in load_file(adapter / peft.WEIGHTS).items()}
    save_file(stored, adapter / peft.WEIGHTS)
    assert run("export", "gguf", adapter, tmp_path / "a.gguf")[0] == 0
    assert set(kinds_of(tmp_path / "a.gguf").values()) == {"F16"}
    found = tensors_of(tmp_path / "a.gguf")["blk.1.ffn_up.weight.lora_b"]
    assert torch.equal(found, stored[f"{peft.PREFIX}model.layers.1.mlp.up_proj.lora_B.weight"].float())


def test_a_checkpoint_s_own_adapter_is_a_file_of_its_own(model: Path, tmp_path: Path, run: Run) -> None:
    make_adapter(model / "adapter", model)
    code, out, err = run("export", "gguf", model, tmp_path / "m.gguf")
    assert (code, out) == (0, f"{tmp_path / 'm.gguf'}\n")
    assert f"compresskit export gguf {model / 'adapter'} ADAPTER.gguf" in err
    assert run("export", "gguf", model / "adapter", tmp_path / "a.gguf")[0] == 0
    assert keys_of(tmp_path / "a.gguf")["general.type"] == "adapter"
    assert keys_of(tmp_path / "m.gguf")["general.type"] == "model"
