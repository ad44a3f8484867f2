"""Small tokenizers of several kinds, trained on a few sentences."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = [
    "The quick brown fox jumps over the lazy dog, and the dog jumps over the quick brown fox again.",
    "Seven quiet engineers measure how small a model can be before it forgets how to count to seventeen.",
    "Ein schneller brauner Fuchs springt über den faulen Hund; größer wird er davon nicht.",
    "быстрая лиса прыгает через ленивую собаку и бежит дальше",
]
SPECIAL = ["<unk>", "<s>", "</s>"]
LATE = "<|late|>"
"""An added token with a number after all others."""


@cache
def byte_level() -> str:
    """BPE over bytes, with a start token that the post-processor adds, as tokenizer.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(LATE, special=True)])
    return str(tokenizer.to_str())


@cache
def byte_fallback(kind: str) -> str:
    """BPE or Unigram over characters, with a token for each byte, as tokenizer.json."""
    plain = Tokenizer(models.BPE() if kind == "BPE" else models.Unigram())
    normal = normalizers.Replace(" ", "▁")
    plain.normalizer = normal
    plain.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    trainer = trainers.BpeTrainer if kind == "BPE" else trainers.UnigramTrainer
    settings = {"unk_token": "<unk>"} if kind == "Unigram" else {}
    plain.train_from_iterator(TEXT * 3, trainer(vocab_size=260, special_tokens=SPECIAL, show_progress=False, **settings))
    content = json.loads(plain.to_str())
    model = content["model"]
    if kind == "BPE":
        for byte in range(256):
            model["vocab"][f"<0x{byte:02X}>"] = len(model["vocab"])
        model |= {"byte_fallback": True, "unk_token": "<unk>"}
    else:
        model["vocab"] += [[f"<0x{byte:02X}>", -20.0] for byte in range(256)]
        model |= {"byte_fallback": True}
    found = Tokenizer.from_str(json.dumps(content))
    found.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return str(found.to_str())


def made(kind: str) -> str:
    """The tokenizer.json of a kind: byte-level, BPE or Unigram."""
    return byte_level() if kind == "byte-level" else byte_fallback(kind)


def write(folder: Path, kind: str) -> None:
    """Write tokenizer.json and its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(made(kind), encoding="utf-8")
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
