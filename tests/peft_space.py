"""Adapters drawn from peft's space of configurations, saved by stock peft, and what stock peft makes of them.

A drawn adapter is a dictionary: the arguments of LoraConfig, the dtype of its file and the style of its keys.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.stock import quiet

WEIGHTS = "adapter_model.safetensors"
FAMILY = "llama"
SIZES: dict[str, object] = {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
"""Biases, so that stock peft can merge those of adapters."""
TARGETS: list[Any] = [
    ["q_proj", "v_proj"],
    ["up_proj"],
    ["model.layers.1.mlp.down_proj", "o_proj"],
    r".*\.0\.self_attn\.(q|k)_proj",
    "all-linear",
]
OTHER_TARGETS: list[Any] = [["q_proj", "embed_tokens"], ["down_proj", "lm_head"]]
"""With an embedding, and with the output layer."""
KEEPS_BASE = [True, False, "gaussian", "Gaussian", "eva", "mica", "orthogonal"]
CHANGES_BASE = ["pissa", "olora", "OLoRA"]
UNKNOWN_CHANGE = ["pissa_niter_2", "lora_ga"]
STYLES = {
    "saved": lambda name: name,
    "with the adapter's name": lambda name: re.sub(r"(lora_embedding_[AB]|lora_[AB])", r"\1.default", name),
    "with another name": lambda name: re.sub(r"(lora_embedding_[AB]|lora_[AB])", r"\1.mine", name),
    "without the prefix": lambda name: name.removeprefix("base_model.model."),
}
LOADED_STYLES = ("saved", "with the adapter's name")
CHANGES = ("init", "targets", "dora", "lora_bias", "bias", "modules", "layers", "tokens", "exclude", "style")
"""What makes a plain adapter another."""
ALPHAS = st.sampled_from([1, 3, 8, 16])

PLAIN = st.fixed_dictionaries(
    {
        "r": st.sampled_from([2, 4]),
        "lora_alpha": ALPHAS,
        "use_rslora": st.booleans(),
        "target_modules": st.sampled_from(TARGETS),
        "init_lora_weights": st.sampled_from(KEEPS_BASE),
        "rank_pattern": st.dictionaries(
            st.sampled_from(["q_proj", r".*\.1\..*_proj", "layers.0.mlp.up_proj"]), st.just(2), max_size=1
        ),
        "alpha_pattern": st.dictionaries(st.sampled_from(["v_proj", r".*\.0\..*_proj", "up_proj"]), ALPHAS, max_size=2),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "style": st.sampled_from(LOADED_STYLES),
    }
)
"""Adapters whose update is a plain product of factors of linears."""


@st.composite
def anything(draw: st.DrawFn) -> dict[str, Any]:
    """A plain adapter, with up to two things that make it another."""
    found: dict[str, Any] = draw(PLAIN)
    for key in draw(st.lists(st.sampled_from(CHANGES), max_size=2)):
        if key == "init":
            found["init_lora_weights"] = draw(st.sampled_from([*CHANGES_BASE, *UNKNOWN_CHANGE]))
        elif key == "targets":
            found["target_modules"] = draw(st.sampled_from(OTHER_TARGETS))
        elif key == "bias":
            found["bias"] = draw(st.sampled_from(["all", "lora_only"]))
        elif key == "modules":
            found["modules_to_save"] = ["lm_head"]
        elif key == "layers":
            found["layers_to_transform"] = [1]
        elif key == "tokens":
            found["trainable_token_indices"] = [3, 7]
        elif key == "exclude":
            found["exclude_modules"] = draw(st.sampled_from([["v_proj"], r".*\.0\..*"]))
        elif key == "style":
            found["style"] = draw(st.sampled_from(list(STYLES)))
        else:
            found["use_dora" if key == "dora" else key] = True
    return found


def stock_model(base: Path) -> Any:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(base)


def make(folder: Path, base: Path, drawn: dict[str, Any], seed: int = 0) -> Path | None:
    """Save a drawn adapter, as if trained; None where stock peft makes none."""
    drawn = dict(drawn)
    dtype, style = drawn.pop("dtype"), STYLES[drawn.pop("style")]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            network = get_peft_model(stock_model(base), LoraConfig(task_type="CAUSAL_LM", **drawn))
        except (ValueError, TypeError):  # combinations that peft refuses
            return None
        with torch.no_grad():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        network.save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    save_file({style(name): tensor.to(dtype) for name, tensor in tensors.items()}, folder / WEIGHTS)
    return folder


def stock_change(folder: Path, base: Path) -> dict[str, torch.Tensor]:
    """What stock peft makes of an adapter: by parameter, what it adds to the base's, float64; nothing where that is 0."""
    before = stock_model(base).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = PeftModel.from_pretrained(stock_model(base), folder).merge_and_unload().state_dict()
    found = {name: after[name].double() - before[name].double() for name in before}
    return {name: change for name, change in found.items() if bool(change.any())}
