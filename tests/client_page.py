"""benchmarks/results/clients.jsonl and the page that is written from it, docs/clients.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client_artifacts import ARTIFACTS, BY_NAME

from compresskit.checkpoint.whole_files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "clients.jsonl"
PAGE = ROOT / "docs" / "clients.md"
CLIENTS = {
    "transformers": "transformers",
    "peft": "peft",
    "vllm": "vLLM, CPU",
    "vllm-plugin": "vLLM, CPU, beside our package",
    "llama.cpp": "llama.cpp after its own converter, llama-cpp-python",
    "llama.cpp-export": "llama.cpp after `export gguf`, llama-cpp-python",
}
"""Title of each client's column."""
TITLES = {
    "dense": "dense, float32",
    "dense-bf16": "dense, bfloat16",
    "uniform": "pruned, one width",
    "padded": "pruned, padded",
    "ragged": "pruned, ragged: llama",
    "ragged-mistral": "pruned, ragged: mistral",
    "ragged-qwen2": "pruned, ragged: qwen2",
    "ragged-qwen3": "pruned, ragged: qwen3",
    "ragged-gemma3_text": "pruned, ragged: gemma3_text",
    "fewer-blocks": "fewer blocks",
    "fewer-tokens": "fewer tokens",
    "merged": "repaired and merged",
    **{f"{bits}-bit-{zero}{more}": f"{bits} bits, {zero}, {more[1:] or 'bfloat16'}"
       for more in ("", "-float32") for bits in (2, 3, 4, 8) for zero in ("symmetric", "asymmetric")},
    "gptq-4-bit": "GPTQ, 4 bits, symmetric",
    "gptq-3-bit": "GPTQ, 3 bits, asymmetric",
    "nf4": "nf4",
    "apiq-4-bit": "ApiQ, 4 bits, symmetric",
    "apiq-with-adapter": "ApiQ, 4 bits, with its adapter",
    "eora-over-4-bit": "EoRA adapter over 4 bits",
    "eora-float8": "the same, `--adapter-bits 8`",
    "eora-rank-budget": "the same, ranks that differ",
    "lora-over-dense": "LoRA over the dense model",
    "expanded": "ternary adapter, expanded",
    "ragged-4-bit": "ragged, 4 bits",
    "ragged-4-bit-lora": "EoRA adapter over ragged, 4 bits",
}  # fmt: skip
"""What an artifact is called on the page."""
Row = dict[str, Any]
HEAD = """\
# Clients: what runs where

Every form of output, given to the clients that people serve with. `benchmarks/clients.py` makes the files, runs the clients
and writes this page from `benchmarks/results/clients.jsonl`; a test compares the two.

"runs" means: the client loads the files; it chooses the tokens that our own float32 model of them chooses, over {tokens} tokens
after five prompts; and its log-probabilities differ by no more than its precision explains (a mean of {float32} nats in float32,
of {bfloat16} in bfloat16; with an adapter, of half of what the adapter changes at most). The number is the larger of the two mean
differences, over the prompts and over the chosen tokens. "-": not run, or nothing to run. A letter stands for the client's own
words, below.

The models are the first blocks of SmolLM2-135M-Instruct and random models of the other families. Files of `gptq` and `rtn` have
the same form, so that not every width is made by both.

"""
FOOT = """
## Conditions

- transformers takes `trust_remote_code=True` for ragged folders, vLLM `--trust-remote-code`; beside our package, no flag.
- vLLM runs on a CPU, eager, with `VLLM_CPU_INT4_W4A8=0`; otherwise, on processors with AMX, it rounds activations to 8 bits
  under 4-bit weights. Checkpoints in float32 with low-bit linears are computed in bfloat16, its own choice. With a LoRA, its
  log-probabilities of prompts crash for any adapter, so that there the chosen tokens alone are compared. On CUDA nothing was run.
- llama.cpp runs files of its own converter (build 11434) in F32, so that the format is judged and not its kernels' rounding.
  Its own int8 rounding of activations comes on top where `export gguf` keeps low bits (a mean of {int8} nats at most).
- llama.cpp's own converter of adapters reads `lora_alpha` alone and not `alpha_pattern`. Our adapters state one `lora_alpha` for
  all linears; those of earlier releases in 8 bits, or with ranks that differ, load as garbage there: use `export gguf`.

## How the files are made

"""


def rows() -> list[Row]:
    """All rows, as they are in the file."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def replace(row: Row) -> None:
    """Write the row in place of an older one, in the order of artifacts and clients."""
    kept = {(each["artifact"], each["client"]): each for each in rows()} | {(row["artifact"], row["client"]): row}
    names, clients = [artifact.name for artifact in ARTIFACTS], list(CLIENTS)
    order = sorted((key for key in kept if key[0] in names), key=lambda key: (names.index(key[0]), clients.index(key[1])))
    write_whole(RESULTS, "".join(json.dumps(kept[key]) + "\n" for key in order))


def write() -> None:
    """The page anew."""
    write_whole(PAGE, text(rows()))


def text(found: list[Row]) -> str:
    """The page of these rows."""
    from client_runs import BOUNDS, NEW_TOKENS, PROMPTS

    clients = [client for client in CLIENTS if any(row["client"] == client for row in found)]
    letters = _letters(found)
    lines = [f"| form | {' | '.join(_title(client, found) for client in clients)} |", "|---" * (len(clients) + 1) + "|"]
    by_place = {(row["artifact"], row["client"]): row for row in found}
    for name in dict.fromkeys(row["artifact"] for row in found):
        cells = [_cell(by_place.get((name, client)), letters) for client in clients]
        lines.append(f"| {TITLES[name]} | {' | '.join(cells)} |")
    made = [f"- {TITLES[name]}: {_command(name)}" for name in dict.fromkeys(row["artifact"] for row in found)]
    reasons = [f"- **{letter}** `{words.replace('`', chr(39))}`" for words, letter in letters.items()]
    head = HEAD.format(tokens=len(PROMPTS) * NEW_TOKENS, **BOUNDS)
    return (
        head
        + "\n".join([*lines, "", "## Refused, in the client's words", "", *(reasons or ["Nothing."])])
        + "\n"
        + FOOT.format(**BOUNDS)
        + "\n".join(made)
        + "\n"
    )


def _title(client: str, found: list[Row]) -> str:
    versions = sorted({row["version"] for row in found if row["client"] == client and row["version"]})
    return f"{CLIENTS[client]} {', '.join(versions)}".strip()


def _letters(found: list[Row]) -> dict[str, str]:
    words = dict.fromkeys(row["words"] for row in found if row["verdict"] == "refused")
    return {each: chr(ord("a") + index) if index < 26 else f"a{chr(ord('a') + index - 26)}" for index, each in enumerate(words)}


def _cell(row: Row | None, letters: dict[str, str]) -> str:
    if row is None:
        return "-"
    if row["verdict"] == "refused":
        return f"refused {letters[row['words']]}"
    worst = max(row["generated_difference"], row["prompt_difference"] or 0.0)
    return f"{row['verdict']}, {worst:.4f}"


def _command(name: str) -> str:
    """How it is made, in words of the command line; sources are named as on the bench."""
    artifact = BY_NAME[name]
    if not artifact.command:
        return {"lora-over-dense": "stock peft"}.get(name, "the first blocks of SmolLM2-135M-Instruct")
    return "`" + " ".join(word.strip("{}") for word in artifact.command.split() if word != "{out}") + "`"
