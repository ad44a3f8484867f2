"""Logits of checkpoint folders by stock transformers, in a process that cannot import compresskit, and by our own walk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import VOCABULARY

from compresskit.machine.device import Where
from compresskit.models.load import open_any
from compresskit.walk.walk import Walk

LOADER = """
import json, sys, torch
from pathlib import Path
sys.modules["compresskit"] = None
from transformers import AutoModelForCausalLM
tokens = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    alone = Path(folder, "adapter_config.json")
    base = json.loads(alone.read_text())["base_model_name_or_path"] if alone.is_file() else folder
    adapter = folder if alone.is_file() else folder + "/adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=True).eval()
    if Path(adapter).is_dir():
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter).eval()
    for module in model.modules():  # bitsandbytes' kernel for such processors computes in bfloat16, and takes no narrow layers
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        torch.save(model(tokens).logits, folder + ".logits")
"""


def tokens() -> torch.Tensor:
    """Two windows of 40 byte tokens."""
    return torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(7))


def walked_logits(folder: Path) -> torch.Tensor:
    """By our walk, with the adapter that lies in the folder, or on its base where the folder is an adapter."""
    walk = Walk(open_any(str(folder)), tokens(), Where(torch.device("cpu"), torch.float32))
    for _ in walk:
        pass
    return torch.cat([logits for _, _, logits in walk.logits()])


def stock_logits(folders: list[Path], scratch: Path) -> list[torch.Tensor]:
    """By transformers and, where there is an adapter, peft."""
    torch.save(tokens(), scratch / "tokens.pt")
    command = [sys.executable, "-c", LOADER, str(scratch / "tokens.pt"), *map(str, folders)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return [torch.load(f"{folder}.logits") for folder in folders]
