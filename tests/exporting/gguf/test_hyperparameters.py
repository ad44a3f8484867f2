"""exporting/gguf/hyperparameters.py: rotations, notes and refusals, against transformers' own frequencies. Oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Run
from gguf_files import keys_of, tensors_of
from tiny_models import make_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from compresskit.exporting.gguf.hyperparameters import llama3_factors

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "original_max_position_embeddings": 64}


def test_the_factors_of_llama_3_are_what_transformers_divides_frequencies_by() -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, max_position_embeddings=512, rope_parameters=LLAMA3)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(np.arange(0, 64, 2) / 64)
    found = llama3_factors(LLAMA3, 64)
    assert np.allclose(found, plain / stretched.numpy(), rtol=1e-5)
    assert found.min() == 1.0
    assert found.max() == 8.0


def test_stretched_rotations_are_written_as_a_tensor(tmp_path: Path, run: Run) -> None:
    source = make_model(tmp_path / "model", "llama", rope_parameters=LLAMA3)
    assert run("export", "gguf", source, tmp_path / "m.gguf")[0] == 0
    assert tensors_of(tmp_path / "m.gguf")["rope_freqs.weight"].tolist() == llama3_factors(LLAMA3, 8).tolist()


@pytest.mark.parametrize(("family", "changes", "expected"), [
    ("qwen2", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
     {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0, "qwen2.rope.freq_base": 5000.0}),
    ("qwen3", {"rope_parameters": YARN},
     {"qwen3.rope.scaling.type": "yarn", "qwen3.rope.scaling.original_context_length": 64, "qwen3.attention.key_length": 8}),
    ("gemma2", {"query_pre_attn_scalar": 8},
     {"gemma2.attention.sliding_window": 16, "gemma2.attn_logit_softcapping": 50.0, "gemma2.final_logit_softcapping": 30.0}),
    ("gemma3_text", {"query_pre_attn_scalar": 8},
     {"gemma3.rope.freq_base": 1e6, "gemma3.rope.freq_base_swa": 1e4,
      "gemma3.attention.sliding_window_pattern": [True, False, True]}),
    ("phi", {}, {"phi2.rope.dimension_count": 4, "phi2.attention.head_count_kv": 2}),
    ("gpt2", {}, {"gpt2.context_length": 256, "gpt2.feed_forward_length": 96}),
])  # fmt: skip
def test_settings_of_a_family_become_keys(
    family: str, changes: dict[str, Any], expected: dict[str, Any], tmp_path: Path, run: Run
) -> None:
    source = make_model(tmp_path / "model", family, **changes)
    assert run("export", "gguf", source, tmp_path / "m.gguf")[0] == 0
    found = keys_of(tmp_path / "m.gguf")
    assert {key: found.get(key) for key in expected} == expected


def test_a_window_that_llama_cpp_does_not_know_is_told(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    code, out, err = run("export", "gguf", tiny["mistral"], tmp_path / "m.gguf", "--json")
    assert code == 0
    assert json.loads(out)["notes"] == ["sliding window of 16 tokens: llama.cpp attends to all tokens in this architecture"]
    assert "sliding window of 16 tokens" in err


@pytest.mark.parametrize(("family", "changes", "reason"), [
    ("llama", {"hidden_act": "gelu"}, "activation 'gelu'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic'"),
    ("gemma2", {}, "query_pre_attn_scalar is 256"),
    ("qwen3", {"attention_bias": True}, "attention_bias is True"),
    ("phi", {"tie_word_embeddings": True}, "takes only a head of its own"),
    ("smollm3", {"no_rope_layers": [1, 0, 1]}, "no_rope_layers is [1, 0, 1]"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("mixtral", {}, "is not exported to GGUF; known are llama, mistral"),
])  # fmt: skip
def test_what_llama_cpp_has_built_in_otherwise_is_refused_before_any_work(
    family: str, changes: dict[str, Any], reason: str, tmp_path: Path, run: Run
) -> None:
    source = make_model(tmp_path / "model", family, **changes)
    code, out, err = run("export", "gguf", source, tmp_path / "m.gguf")
    assert (code, out) == (2, "")
    assert reason in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
