"""Adapters of every kind, as stock peft saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

KINDS: dict[str, PeftConfig] = {
    "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    "dora": LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"),
    "saved": LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


def make_adapter(base: Path, folder: Path, kind: str = "lora", seed: int = 0) -> Path:
    """A random adapter saved by stock peft."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), KINDS[kind])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
