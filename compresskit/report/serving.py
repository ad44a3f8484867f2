"""Commands that load a run's result with stock tools."""

from __future__ import annotations

from pathlib import Path

from compresskit.checkpoint.reader import read_json

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r}{more})
tokenizer = AutoTokenizer.from_pretrained({base!r})"""
PEFT = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, {adapter!r})"""


def commands(folder: Path) -> dict[str, str]:
    """Commands by title, for the checkpoint or adapter in this folder."""
    found = places(folder)
    if found is None:
        return {"Expand to a normal adapter or checkpoint": f"compresskit expand {folder} expanded"}
    base, adapter = found
    config_file = Path(base) / "config.json"
    ragged = config_file.is_file() and "auto_map" in read_json(config_file)
    code = TRANSFORMERS.format(base=base, more=", trust_remote_code=True" if ragged else "")
    serve = f"vllm serve {base}" + (" --trust-remote-code" if ragged else "")
    texts = {"transformers" + (" and peft" if adapter else ""): code + (PEFT.format(adapter=adapter) if adapter else "")}
    if adapter:
        rank = max_rank(Path(adapter))
        serve += f" --enable-lora --max-lora-rank {rank} --lora-modules repair={adapter}"
    return {**texts, "vLLM": serve}


def places(folder: Path) -> tuple[str, str | None] | None:
    """Return (checkpoint, adapter or None) of the folder; None if it is neither."""
    if (folder / "config.json").is_file():
        inside = folder / "adapter"
        return str(folder), str(inside) if inside.is_dir() else None
    if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file():
        return str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE"), str(folder)
    return None


def max_rank(adapter: Path) -> int:
    """Largest rank of an adapter, rounded up to a power of two from 8 on, as vLLM requires."""
    config = read_json(adapter / ADAPTER_CONFIG)
    largest = max([int(config.get("r") or 1), *(config.get("rank_pattern") or {}).values()])
    power: int = 1 << (largest - 1).bit_length()
    return max(8, power)
