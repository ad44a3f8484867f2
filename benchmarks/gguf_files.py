"""GGUF files in llama.cpp, beside the model in memory: tiny models of every family, SmolLM2 in every form, tokenizers.

    PYTHONPATH=.:tests python benchmarks/gguf_files.py --client ENVIRONMENT/bin/python [--parts families,variants,real,tokenizers]
        [--only "a;b"] [--work FOLDER] [--out FILE.jsonl]

ENVIRONMENT has llama-cpp-python. The file is compared with stock transformers in float32 (adapters by peft), token by token:
mean |difference| of log-probabilities, equal greedy tokens, and the ratio of perplexities.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from families import build
from family_stages import write_tokenizer
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.torch import save_file
from tiny_models import TINY_CONFIGS, VOCABULARY, make_adapter, make_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from compresskit.api import stage
from compresskit.calibration import encode
from compresskit.checkpoint import source
from compresskit.checkpoint.stock import next_logits
from compresskit.evaluation.request import read_evaluation_text
from compresskit.exporting.gguf.families import FAMILIES
from compresskit.machine.device import Where
from compresskit.models.load import open_any
from compresskit.models.ragged import load_stock

CLIENT = Path(__file__).with_name("gguf_client.py")
TEXT = {"calibration": "builtin", "samples": 8, "sequence_length": 64}
HARD = (
    "Hello, World! I'm 12345.67 years OLD; we've 3x more?!  two  spaces\n\n\tTabs\r\nand CRLF",
    "Ünïcödé naïve façade — “quotes” … 中文字符混排 テスト 한국어 Русский текст العربية हिन्दी ไทย",
    "emoji 😀👍🏽 zero\u200dwidth, combining e\u0301, 1234567890123, 007 ½ ² Ⅷ ١٢٣",
    "def f(x):\n    return x**2  # comment\n\n\nclass A:\n        pass\n" + " " * 17 + "end ",
    "can't CAN'T Don't we'LL they'd'VE 'S o'clock camelCaseHTTPServer snake_case ALLCAPS iPhone",
)
PROMPTS = 5
GREEDY = 48


def asked(client: str, path: Path, windows: list[list[int]], texts: tuple[str, ...] = (), adapter: Path | None = None) -> Any:
    """What the client says of a file."""
    prompts = [window[:16] for window in windows[:PROMPTS]]
    request = {
        "model": str(path), "adapter": str(adapter) if adapter else None, "windows": windows, "prompts": prompts,
        "greedy": GREEDY, "texts": texts, "threads": 1,
    }  # fmt: skip
    done = subprocess.run([client, str(CLIENT)], input=json.dumps(request), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"}
    return json.loads(done.stdout)


def reference(folder: Path | str, windows: list[list[int]]) -> dict[str, Any]:
    """The same of the model in memory."""
    network = load_stock(open_any(str(folder)), Where(torch.device("cpu"), torch.float32, False)).float()
    found: dict[str, Any] = {"log_probabilities": [], "greedy": []}
    with torch.no_grad():
        for window in windows:
            tokens = torch.tensor([window])
            scores = network(input_ids=tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            found["log_probabilities"].append(scores.gather(1, tokens[0, 1:, None])[:, 0].tolist())
        for window in windows[:PROMPTS]:
            tokens, cache, chosen = torch.tensor([window[:16]]), None, []
            for _ in range(GREEDY):
                logits, cache = next_logits(network, tokens, cache)
                tokens = logits[:, -1:].argmax(-1)
                chosen.append(int(tokens))
            found["greedy"].append(chosen)
    return found


def compared(found: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Differences between two answers."""
    if "refused" in found:
        return found
    first, second = (np.concatenate(each["log_probabilities"]) for each in (found, wanted))
    equal = [a == b for x, y in zip(found["greedy"], wanted["greedy"], strict=True) for a, b in zip(x, y, strict=True)]
    return {
        "difference": float(np.abs(first - second).mean()),
        "perplexity": math.exp(-first.mean()),
        "perplexity_in_memory": math.exp(-second.mean()),
        "perplexity_ratio": math.exp(second.mean() - first.mean()),
        "greedy_equal": f"{sum(equal)}/{len(equal)}",
    }


def exported(folder: Path | str, out: Path, **settings: Any) -> dict[str, Any]:
    result = stage("export", folder, out, "gguf", True, {"overwrite": True, **settings})
    kept = ("architecture", "tensor_types", "bits_per_weight", "exact", "largest_rounding_error", "notes")
    size = out.stat().st_size
    return {key: result[key] for key in kept} | {
        "bytes": size, "over_bits": size / (result["bits_per_weight"] * result["parameters_after"] / 8) - 1,
    }  # fmt: skip


def exact_blocks(path: Path, folder: Path) -> dict[str, bool]:
    """Whether the dequantised blocks are what our reader unpacks, bit for bit in its dtype; rows in any order."""
    model, same = open_any(str(folder), adapter="none"), True
    if model.format is None:
        return {}
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    kinds = {"ffn_down": 2, "ffn_up": 1, "attn_v": 2, "attn_q": 0}
    for index in (0, model.block_count - 1):
        found = {name.rpartition(".")[2]: name for name in model.block_linears(index)}
        for kind in kinds:
            linear = next((name for short, name in found.items() if _short(kind) == short), None)
            if linear is None or f"blk.{index}.{kind}.weight" not in tensors:
                continue
            tensor = tensors[f"blk.{index}.{kind}.weight"]
            ours = model.format.read(model.stored_name(linear))
            theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).to(ours.dtype)
            theirs = theirs[: ours.shape[0], : ours.shape[1]]
            order = (lambda rows: sorted(map(bytes, rows.float().numpy()))) if kind == "attn_q" else (lambda rows: rows)
            same &= order(ours) == order(theirs) if kind == "attn_q" else torch.equal(ours, theirs)
    return {"blocks_equal": same}


def _short(kind: str) -> str:
    return {"ffn_down": "down_proj", "ffn_up": "up_proj", "attn_v": "v_proj", "attn_q": "q_proj"}[kind]


@contextlib.contextmanager
def timed(row: dict[str, Any]) -> Iterator[None]:
    started = time.monotonic()
    yield
    row["seconds"] = round(time.monotonic() - started, 1)


Make = Callable[[Path | str, Path], Path | str]


def forms(group: int, widths: dict[str, Any]) -> dict[str, Make]:
    """Name -> function(dense, folder) that makes the checkpoint to export."""

    def pruned(layout: str, **settings: Any) -> Make:
        given = {"sparsity": 0.3, "layout": layout, "overwrite": True, **TEXT, **widths, **settings}

        def make(dense: Path | str, out: Path) -> Path:
            stage("prune", dense, out, "magnitude", True, given)
            return out

        return make

    def rounded(bits: int, symmetric: bool, first: Make | None = None, size: int = group) -> Make:
        def make(dense: Path | str, out: Path) -> Path:
            start = first(dense, out.with_name(out.name + "-first")) if first else dense
            given = {"bits": bits, "symmetric": symmetric, "group_size": size, "overwrite": True, **TEXT}
            stage("quantize", start, out, "rtn", True, given)
            return out

        return make

    def nf4(dense: Path | str, out: Path) -> Path:
        stage("quantize", dense, out, "nf4", True, {"overwrite": True, **TEXT})
        return out

    def unpacked(dense: Path | str, out: Path) -> Path:
        """The weights of 4 bits as our reader unpacks them, dense: llama.cpp then rounds no activations."""
        low = rounded(4, True)(dense, out.with_name(out.name + "-low"))
        model = open_any(str(low))
        assert model.format is not None
        packed = {part for name in model.linears for part in model.format.stored_tensors(name)}
        tensors = {name: model.checkpoint.read(name).float() for name in model.checkpoint.tensors if name not in packed}
        tensors |= {f"{name}.weight": model.format.read(name).float() for name in model.linears}
        shutil.copytree(low, out, ignore=shutil.ignore_patterns("*.safetensors*", "compresskit.json"))
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        config = {key: value for key, value in model.checkpoint.config.items() if key != "quantization_config"}
        (out / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
        return out

    ragged = pruned("ragged", allocation="global")
    return {
        "dense": lambda dense, out: dense,
        "uniform": pruned("ragged", allocation="uniform"),
        "padded": pruned("padded", allocation="global"),
        "ragged": ragged,
        "8 bits": rounded(8, True),
        "8 bits asymmetric": rounded(8, False),
        "4 bits": rounded(4, True),
        "4 bits asymmetric": rounded(4, False),
        "4 bits, unpacked": unpacked,
        "3 bits": rounded(3, True),
        "3 bits asymmetric": rounded(3, False),
        "2 bits asymmetric": rounded(2, False),
        "4 bits in groups of 16": rounded(4, True, size=16),
        "nf4": nf4,
        "ragged, 4 bits": rounded(4, True, ragged),
        "ragged, 4 bits asymmetric": rounded(4, False, ragged),
        "ragged, 3 bits asymmetric": rounded(3, False, ragged),
    }


def every_family(client: str, work: Path, only: set[str]) -> Iterator[dict[str, Any]]:
    for family in FAMILIES:
        if only and family not in only:
            continue
        dense, vocabulary = tiny_model(work / family, family)
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(3, vocabulary, (5, 64), generator=generator).tolist()
        for form in ("dense", "ragged", "4 bits", "4 bits asymmetric", "4 bits, unpacked", "adapter", "ragged, adapter"):
            row: dict[str, Any] = {"part": "families", "family": family, "form": form}
            with timed(row):
                row |= family_row(client, dense, work / f"{family}-{form.replace(' ', '-')}", form, windows)
            yield row


def tiny_model(folder: Path, family: str) -> tuple[Path, int]:
    """A tiny random checkpoint and the number of its tokens."""
    if family in TINY_CONFIGS:
        return make_model(folder, family, **CHANGES.get(family, {})), VOCABULARY
    build(family, folder)
    write_tokenizer(folder)
    return folder, 100


CHANGES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 32},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 32},
}
"""What tiny models need besides tests/tiny_models.py: what llama.cpp has built in."""


PLAIN = {"rope_type": "default", "rope_theta": 1e4}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases in every linear": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "wide heads": ("llama", {"head_dim": 16}),
    "linear": ("llama", {"rope_parameters": PLAIN | {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", {"rope_parameters": PLAIN | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }}),
    "yarn": ("qwen2", {"rope_parameters": PLAIN | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "half rotated": ("phi3", {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
    "longrope": ("phi3", {"original_max_position_embeddings": 48, "rope_parameters": PLAIN | {
        "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 48,
    }}),
    "linear and windows": ("gemma3_text", {
        "query_pre_attn_scalar": 8, "sliding_window": 32, "num_hidden_layers": 6, "layer_types": None,
        "rope_parameters": {"full_attention": PLAIN | {"rope_type": "linear", "factor": 8.0}, "sliding_attention": PLAIN},
    }),
}  # fmt: skip
"""Rotations and shapes that a family may have; dense."""


def variants(client: str, work: Path, only: set[str]) -> Iterator[dict[str, Any]]:
    windows = torch.randint(3, VOCABULARY, (5, 64), generator=torch.Generator().manual_seed(0)).tolist()
    for name, (family, changes) in VARIANTS.items():
        if only and name not in only:
            continue
        folder = make_model(work / name.replace(" ", "-"), family, **changes)
        row: dict[str, Any] = {"part": "variants", "family": family, "form": name}
        yield row | family_row(client, folder, work / f"{name.replace(' ', '-')}-out", "dense", windows)


def family_row(client: str, dense: Path, out: Path, form: str, windows: list[list[int]]) -> dict[str, Any]:
    known = forms(32, {"round_to": 1})
    file, adapter = out.with_suffix(".gguf"), None
    try:
        folder = known[form.removesuffix("adapter").strip(", ") or "dense"](dense, out)
        row = exported(folder, file)
        if form.endswith("adapter"):
            adapter = out.with_name(f"{out.name}-adapter.gguf")
            folder = make_adapter(out.with_name(f"{out.name}-adapter"), Path(folder))
            row |= exported(folder, adapter)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return (
        row | compared(asked(client, file, windows, (), adapter), reference(folder, windows)) | exact_blocks(file, Path(folder))
    )


def real(client: str, work: Path, only: set[str]) -> Iterator[dict[str, Any]]:
    dense = source.resolve(source.DEMO)
    ids = encode(dense, read_evaluation_text("builtin")[0], True, False)
    windows = [ids[start : start + 256] for start in range(0, 5 * 256, 256)]
    for form, make in {**forms(64, {"round_to": 64}), "embedding q8_0": lambda dense, out: dense}.items():
        if only and form not in only:
            continue
        row: dict[str, Any] = {"part": "real", "form": form}
        with timed(row):
            folder = make(dense, work / form.replace(" ", "-"))
            file = work / "file.gguf"
            given = {"embedding": "q8_0", "weights": "f16"} if form == "embedding q8_0" else {}
            row |= exported(folder, file, **given)
            answer = asked(client, file, windows, HARD)
            row |= compared(answer, reference(folder, windows)) | exact_blocks(file, Path(folder))
            row["tokens_equal"] = answer.get("tokens") == [encode(Path(folder), text, True, False) for text in HARD]
        yield row


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
GPT4O = TEKKEN.replace("+|[^", f"+{ENDING}|[^", 1).replace(r"*|\p{N}|", rf"*{ENDING}|\p{{N}}{{1,3}}|")


def _split(pattern: str) -> Any:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (pre_tokenizers.ByteLevel(add_prefix_space=False), False),
    "smollm": (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]), False,
    ),
    "llama-bpe": (_split(LLAMA3), True),
    "smaug-bpe": (_split(LLAMA3), False),
    "qwen2": (_split(LLAMA3.replace("{1,3}", "")), False),
    "tekken": (_split(TEKKEN), True),
    "gpt-4o": (_split(GPT4O), True),
    "sentencepiece, space first": (True, False),
    "sentencepiece": (False, False),
}  # fmt: skip
"""Pre-tokenizer and `ignore_merges` of a byte-level tokenizer; of one like SentencePiece's whether a space comes first."""


def tokenizers(client: str, work: Path, only: set[str]) -> Iterator[dict[str, Any]]:
    from transformers import PreTrainedTokenizerFast

    text = read_evaluation_text("builtin")[0].splitlines() + list(HARD) * 40
    for name, (kind, whole_words) in SPLITS.items():
        if only and name not in only:
            continue
        tokenizer = byte_level(kind, whole_words, text) if not isinstance(kind, bool) else like_sentencepiece(kind, text)
        folder = make_model(work / name.replace(" ", "-"), "llama", vocab_size=TOKENS)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        wrapped.save_pretrained(folder)
        file = work / "tokenizer.gguf"
        row: dict[str, Any] = {"part": "tokenizers", "tokenizer": name}
        row |= exported(folder, file)
        texts = (*HARD, *[line for line in text if line.strip()][:200], "<s> inside </s> and ▁ too")
        answer = asked(client, file, [[3] * 20], texts)
        wanted = [wrapped(each)["input_ids"] for each in texts]
        found = answer.get("tokens", [])
        differing = [each for each, one, other in zip(texts, found, wanted, strict=False) if one != other]
        yield (
            row
            | {"texts": len(texts), "texts_equal": len(texts) - len(differing), "first_differing": differing[:1]}
            | ({"refused": answer["refused"]} if "refused" in answer else {})
        )


TOKENS = 2000


def byte_level(kind: Any, whole_words: bool, text: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = kind, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def like_sentencepiece(space_first: bool, text: list[str]) -> Tokenizer:
    """Merges of characters with bytes for unknown ones, whose merges list every split, as conversions of such models do."""
    from tokenizers import normalizers

    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    replaced = normalizers.Replace(" ", "▁")
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if space_first else replaced
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=special, limit_alphabet=200, show_progress=False)
    trained.train_from_iterator(text, trainer)
    found = json.loads(trained.to_str())
    vocabulary = found["model"]["vocab"]
    pieces = sorted((token for token in vocabulary if len(token) > 1 and not token.startswith("<")), key=vocabulary.get)
    merges = [
        [piece[:cut], piece[cut:]]
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    found["model"] |= {"byte_fallback": True, "fuse_unk": True, "merges": merges}
    found["added_tokens"] = [each for each in found["added_tokens"] if each["id"] < 3]
    found["pre_tokenizer"] = None
    found["decoder"] = None
    beginning = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    found["post_processor"] = {
        "type": "TemplateProcessing", "single": list(beginning), "pair": list(beginning),
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }  # fmt: skip
    return Tokenizer.from_str(json.dumps(found))


PARTS = {"families": every_family, "variants": variants, "real": real, "tokenizers": tokenizers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--client", required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    only = {each.strip() for each in arguments.only.split(";") if each.strip()}
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        for part in arguments.parts.split(","):
            for row in PARTS[part](arguments.client, work, only):
                line = json.dumps(row)
                print(line, flush=True)
                if arguments.out:
                    with arguments.out.open("a") as file:
                        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
