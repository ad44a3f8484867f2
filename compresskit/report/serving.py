"""Commands that load a run's result with stock tools: those alone that the client bench ran on results of this form.

docs/clients.md has what was run; formats/clients.py says which low-bit forms those are.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.checkpoint.small_files import read_json
from compresskit.errors import CompresskitError
from compresskit.exporting.gguf.families import FAMILIES
from compresskit.formats.clients import stored_forms, was_run
from compresskit.models import layouts
from compresskit.models.architectures import RAGGED_PREFIX
from compresskit.models.load import architecture_of

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REGISTER = """\
import compresskit

compresskit.register()
"""
TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({base!r}{more})
tokenizer = AutoTokenizer.from_pretrained({base!r})"""
PEFT = """
from peft import PeftModel

model = PeftModel.from_pretrained(model, {adapter!r})"""
LARGEST_RANK = 1 << 20
"""No linear has more rows."""


def commands(folder: Path) -> dict[str, str]:
    """Commands by title, for the checkpoint or adapter in this folder."""
    found = places(folder)
    if found is None:
        return {"Expand to a normal adapter or checkpoint": f"compresskit expand {shell(folder)} expanded"}
    base, adapter = found
    ragged = is_ragged(Path(base))
    trusted = ragged and holds_our_code_only(Path(base))
    code = REGISTER if ragged and not trusted else ""
    code += TRANSFORMERS.format(base=base, more=", trust_remote_code=True" if trusted else "")
    texts = {"transformers" + (" and peft" if adapter else ""): code + (PEFT.format(adapter=adapter) if adapter else "")}
    if runs_in_vllm(Path(base)):
        texts["vLLM"] = _serve(base, adapter, trusted)
    if str(stated_config(Path(base)).get("model_type")).removeprefix(RAGGED_PREFIX) in FAMILIES:
        texts["llama.cpp"] = _export(base, adapter)
    return texts


def _export(base: str, adapter: str | None) -> str:
    """The commands that make files for llama.cpp, and its server's."""
    lines, serve = [f"compresskit export gguf {shell(base)} model.gguf"], "llama-server -m model.gguf"
    if adapter is not None:
        lines.append(f"compresskit export gguf {shell(adapter)} adapter.gguf")
        serve += " --lora adapter.gguf"
    return "\n".join([*lines, serve])


def _serve(base: str, adapter: str | None, trusted: bool) -> str:
    """The command of vLLM's server."""
    serve = f"vllm serve {shell(base)}" + (" --trust-remote-code" if trusted else "")
    if adapter is None:
        return serve
    rank = max_rank(Path(adapter))
    return f"{serve} --enable-lora --max-lora-rank {rank} --lora-modules {shell(f'repair={adapter}')}"


def runs_in_vllm(folder: Path) -> bool:
    """Whether vLLM ran the forms of this folder's linears; a folder that is elsewhere counts as dense."""
    return all(was_run("vllm-cpu", form) or was_run("vllm-cuda", form) for form in stored_forms(stated_config(folder)))


def stated_config(folder: Path) -> dict[str, Any]:
    """config.json; {} where there is none, because an adapter names its base as it likes, at any length."""
    config_file = folder / "config.json"
    try:
        return read_json(config_file) if config_file.is_file() else {}
    except OSError:
        return {}


def shell(word: object) -> str:
    """One word of a shell's command line that means nothing else, whatever file its text comes from."""
    text = f"./{word}" if str(word).startswith("-") else str(word)
    if text.isprintable():
        return shlex.quote(text)
    plain = (each if each.isprintable() and each not in "'\\" else f"\\U{ord(each):08x}" for each in text)
    return f"$'{''.join(plain)}'"


def is_ragged(folder: Path) -> bool:
    """Whether the folder's model is in the ragged layout, for which stock tools need code."""
    return str(stated_config(folder).get("model_type")).startswith(RAGGED_PREFIX)


def holds_our_code_only(folder: Path) -> bool:
    """Whether `trust_remote_code` would run only what we write into the folder of a ragged model."""
    config = read_json(folder / "config.json")
    family = str(config["model_type"]).removeprefix(RAGGED_PREFIX)
    try:
        architecture = architecture_of(open_checkpoint(folder), family)
    except CompresskitError:  # a folder that cannot be read holds nothing that we vouch for
        return False
    if not layouts.can_be_ragged(architecture) or (folder / "custom_generate").exists():
        return False
    if config != layouts.own_config(config, architecture):
        return False
    others = [path for path in folder.glob("*config.json") if path.name != "config.json"]
    if any("auto_map" in read_json(path) for path in others):
        return False
    files, _, _ = layouts.generated_files(family, architecture)
    return all((folder / name).is_file() and (folder / name).read_bytes() == text.encode() for name, text in files.items())


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
    pattern = config.get("rank_pattern")
    stated = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    largest = max((rank for rank in stated if type(rank) is int and 0 < rank <= LARGEST_RANK), default=1)
    power: int = 1 << (largest - 1).bit_length()
    return max(8, power)
