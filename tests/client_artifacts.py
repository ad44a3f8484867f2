"""What benchmarks/clients.py gives to the clients: every form of output of the README's and the documentation's tables.

An artifact is a command line of ours. `{out}` stands for its folder, another artifact's name in braces for that one's folder.
Those without a command are ingredients: a model's first blocks, random models of other families, a random adapter.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresskit.cli.main import main

ADAPTERS = "adapter"
WITHOUT_TEXT = ("expand", "quantize compeft", "prune vocabulary")
"""Commands that take no text."""
SHORT = "--samples 8 --sequence-length 64 --calibration {text}"
TINY = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
        "head_dim": 32, "max_position_embeddings": 512}  # fmt: skip
"""Of a random model: 32 channels a head, because the clients' kernels take no fewer."""
PRUNED = "--sparsity 0.3 --allocation global --round-to 64"
GRID = "quantize rtn {{{source}}} {{out}} --bits {bits} --group-size 64 --{zero}"


@dataclass(frozen=True)
class Artifact:
    """One form of output."""

    name: str
    command: str
    """Of compresskit, without its first word."""
    precision: str = "float32"
    """Of the stored floats, in which a client computes: float32 or bfloat16."""
    base: str = ""
    """The checkpoint that an adapter belongs to; "" for a checkpoint."""
    ragged: bool = False

    @property
    def packed(self) -> bool:
        """Whether its linears, or those of its base, are stored in few bits."""
        return self.command.startswith("quantize") or bool(
            self.base and BY_NAME[self.base if self.base != "self" else "nf4"].packed
        )


def _grids() -> list[Artifact]:
    """Rounding in every width and symmetry that the format has, in both precisions."""
    found = []
    for source, precision, widths in (("dense-bf16", "bfloat16", (2, 3, 4, 8)), ("dense", "float32", (4, 8))):
        for bits in widths:
            for zero in ("symmetric", "asymmetric"):
                name = f"{bits}-bit-{zero}" + ("" if precision == "bfloat16" else "-float32")
                found.append(Artifact(name, GRID.format(source=source, bits=bits, zero=zero), precision))
    return found


BF16 = "bfloat16"
ARTIFACTS = (
    Artifact("dense", ""),
    Artifact("dense-bf16", "", BF16),
    Artifact("uniform", "prune cfsp {dense} {out} --sparsity 0.3 --allocation uniform"),
    Artifact("padded", f"prune cfsp {{dense}} {{out}} {PRUNED} --layout padded"),
    Artifact("ragged", f"prune cfsp {{dense}} {{out}} {PRUNED}", ragged=True),
    *(Artifact(f"ragged-{family}", f"prune cfsp {{{family}}} {{out}} {PRUNED}", ragged=True)
      for family in ("mistral", "qwen2", "qwen3", "gemma3_text")),
    Artifact("fewer-blocks", "prune depth {dense} {out} --blocks 1"),
    Artifact("fewer-tokens", "prune vocabulary {dense} {out} --keep-from {text} --sparsity 0.5"),
    Artifact("merged", "compensate eora {3-bit-damaged} {out} --original {dense} --rank 16 --merge"),
    *_grids(),
    Artifact("gptq-4-bit", "quantize gptq {dense-bf16} {out} --bits 4 --group-size 64 --symmetric", BF16),
    Artifact("gptq-3-bit", "quantize gptq {dense-bf16} {out} --bits 3 --group-size 64 --asymmetric", BF16),
    Artifact("nf4", "quantize nf4 {dense-bf16} {out}", BF16),
    Artifact("apiq-4-bit", "quantize apiq {dense-bf16} {out} --bits 4 --group-size 64 --rank 0 --epochs 1 --symmetric", BF16),
    Artifact("apiq-with-adapter", "quantize apiq {dense-bf16} {out} --bits 4 --group-size 64 --rank 8 --epochs 1", BF16, "self"),
    Artifact("eora-over-4-bit", "compensate eora {4-bit-symmetric} {out} --original {dense-bf16} --rank 8", BF16,
             "4-bit-symmetric"),
    Artifact("eora-float8", "compensate eora {4-bit-symmetric} {out} --original {dense-bf16} --rank 8 --adapter-bits 8", BF16,
             "4-bit-symmetric"),
    Artifact("eora-rank-budget", "compensate eora {4-bit-symmetric} {out} --original {dense-bf16} --rank-budget 0.05", BF16,
             "4-bit-symmetric"),
    Artifact("lora-over-dense", "", base="dense"),
    Artifact("expanded", "expand {ternary} {out}", base="dense"),
    Artifact("ragged-4-bit", "quantize rtn {ragged-bf16} {out} --bits 4 --group-size 64 --symmetric", BF16, ragged=True),
    Artifact("ragged-4-bit-lora", "compensate eora {ragged-4-bit} {out} --original {ragged-bf16} --rank 8", BF16, "ragged-4-bit",
             ragged=True),
)  # fmt: skip
HIDDEN = (
    Artifact("ragged-bf16", f"prune cfsp {{dense-bf16}} {{out}} {PRUNED}", BF16, ragged=True),
    Artifact("3-bit-damaged", "quantize rtn {dense} {out} --bits 3 --group-size 64"),
    Artifact("ternary", "quantize compeft {lora-over-dense} {out} --density 0.3"),
)
"""Ingredients that a command of ours makes."""
BY_NAME = {artifact.name: artifact for artifact in (*ARTIFACTS, *HIDDEN)}


class Kitchen:
    """Makes artifacts in a folder, each once, with what it is made from."""

    def __init__(self, root: Path, model: Path, blocks: int) -> None:
        self.root, self.model, self.blocks = root, model, blocks
        root.mkdir(parents=True, exist_ok=True)
        self.text = root / "text.txt"
        if not self.text.exists():
            from compresskit.calibration.documentation import builtin_text

            self.text.write_text(builtin_text("calibration")[:200_000])

    def __getitem__(self, name: str) -> Path:
        """The folder of an artifact or ingredient."""
        folder = self.root / name
        if not folder.exists():
            self._make(name, folder)
        return folder

    def files(self, artifact: Artifact) -> tuple[Path, Path | None]:
        """(checkpoint, adapter or None)."""
        folder = self[artifact.name]
        if artifact.base == "self":
            return folder, folder / ADAPTERS
        return (self[artifact.base], folder) if artifact.base else (folder, None)

    def _make(self, name: str, folder: Path) -> None:
        artifact = BY_NAME.get(name)
        if artifact is None or not artifact.command:
            self._ingredient(name, folder)
            return
        line = artifact.command + ("" if artifact.command.startswith(WITHOUT_TEXT) else f" {SHORT}")
        words = [word.format_map(_Words(self, {"out": str(folder), "text": str(self.text)})) for word in shlex.split(line)]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--quiet"])
        if ended.value.code not in (None, 0, 3):  # 3: written, and so damaged that it is said
            raise RuntimeError(f"{shlex.join(words)}: ended with {ended.value.code}")

    def _ingredient(self, name: str, folder: Path) -> None:
        """Written beside and moved, so that a broken run leaves nothing half made."""
        work = self.root / f"{name}.making"
        shutil.rmtree(work, ignore_errors=True)
        if name == "dense":
            first_blocks(self.model, work, self.blocks)
        elif name == "dense-bf16":
            in_bfloat16(self["dense"], work)
        elif name == "lora-over-dense":
            from stock_adapters import make_adapter

            make_adapter(self["dense"], work)
        else:
            random_model(name, work, self.model)
        work.rename(folder)


class _Words(dict[str, str]):
    """The folders that a command line names, made when they are asked for."""

    def __init__(self, kitchen: Kitchen, known: dict[str, str]) -> None:
        super().__init__(known)
        self.kitchen = kitchen

    def __missing__(self, name: str) -> str:
        return str(self.kitchen[name])


def first_blocks(model: Path, out: Path, blocks: int) -> None:
    """The first blocks of a llama with its embedding, final norm and tokenizer."""
    out.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = blocks = min(blocks, config["num_hidden_layers"])
    (out / "config.json").write_text(json.dumps(config))
    outside = tuple(f"model.layers.{index}." for index in range(blocks))
    tensors = {
        name: tensor.contiguous()
        for name, tensor in load_file(model / "model.safetensors").items()
        if not name.startswith("model.layers.") or name.startswith(outside)
    }
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    copy_tokenizer(model, out)


def in_bfloat16(model: Path, out: Path) -> None:
    """The same checkpoint with every tensor in bfloat16."""
    out.mkdir(parents=True)
    config = json.loads((model / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "torch_dtype"}
                                                | {"dtype": "bfloat16"}))  # fmt: skip
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    copy_tokenizer(model, out)


def random_model(family: str, out: Path, tokenizer_of: Path) -> None:
    """A small random model with a real tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    source = json.loads((tokenizer_of / "config.json").read_text())
    heads = {"query_pre_attn_scalar": TINY["head_dim"]} if family.startswith("gemma") else {}  # as in all published models
    config = AutoConfig.for_model(
        family, vocab_size=source["vocab_size"], tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2, **TINY,
        **heads,
    )  # fmt: skip
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in network.parameters():  # so that a block, a bias or a norm left out is seen
            parameter.add_(torch.randn_like(parameter), alpha=0.05 if parameter.dim() > 1 else 0.1)
    network.save_pretrained(out)
    copy_tokenizer(tokenizer_of, out)


def copy_tokenizer(model: Path, out: Path) -> None:
    for path in model.iterdir():
        if "token" in path.name or path.name in ("chat_template.jinja", "merges.txt", "vocab.json"):
            shutil.copy(path, out)
