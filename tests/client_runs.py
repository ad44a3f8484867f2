"""Run artifacts in clients, each in an environment of its own, and judge what comes back beside our own float32 walk.

A client's greedy tokens are right where each is the most likely next one of our walk over the prompt and the tokens before
it, or so near to it that the client's precision explains the choice (`BOUNDS`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from client_artifacts import BY_NAME, Artifact
from tokenizers import Tokenizer
from torch import Tensor

from compresskit.machine.device import Where
from compresskit.models.load import open_any
from compresskit.report.serving import max_rank
from compresskit.walk.walk import Walk

PROMPTS = (
    "The history of the city begins with a small settlement on the river, where traders from the north met every summer to sell",
    "In computer science, a binary search looks for a value in a sorted list by comparing it with the middle element and then",
    "She opened the old wooden door slowly and saw that the whole room was filled with letters, photographs and dusty boxes of",
    "To make bread at home you need flour, water, salt and yeast; mix them in a large bowl, let the dough rest for an hour and",
    "Question: what is the capital of France, and which river runs through it? Answer: the capital of France is the city of",
)
PROMPT_TOKENS, NEW_TOKENS = 20, 16
BOUNDS = {"float32": 0.002, "float16": 0.005, "bfloat16": 0.15, "int8": 0.3}
"""Largest mean |difference| of log-probabilities, in nats, by a client's precision.

bfloat16: about three times that of the dense model. float16: of llama.cpp, which keeps keys and values in it. int8: of a client
that rounds activations to 8 bits.
"""
SHARE_OF_EFFECT = 0.5
"""With an adapter, a client is nearer than this to our model with it, measured by what the adapter changes."""
WORDS = 200
RUNS, REFUSED, WRONG = "runs", "refused", "WRONG"


def computed_in(artifact: Artifact, client: str) -> str:
    """The client's precision: that of the files, but for low bits.

    vLLM has kernels for bfloat16 alone and picks that; llama.cpp rounds activations to 8 bits before block types of low bits.
    It multiplies bfloat16 codes and scales in float32, which transformers and our reader round.
    """
    if client == "llama.cpp-export" and artifact.packed:
        return "int8"
    if client.startswith("llama"):
        return "float16" if artifact.precision == "float32" else artifact.precision
    return "bfloat16" if client.startswith("vllm") and artifact.packed else artifact.precision


def prompts(folder: Path) -> list[list[int]]:
    """Five prompts of one length."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids[:PROMPT_TOKENS] for text in PROMPTS]


def job(artifact: Artifact, client: str, model: Path, adapter: Path | None) -> dict[str, Any]:
    """What a client is asked."""
    ids = prompts(model)
    return {
        "name": f"{client}:{artifact.name}",
        "client": client,
        "model": str(model),
        "adapter": str(adapter) if adapter else None,
        "rank": max_rank(adapter) if adapter and (adapter / "adapter_config.json").is_file() else 0,
        "dtype": computed_in(artifact, client),
        "trust": artifact.ragged and not client.endswith("plugin"),
        "prompts": ids,
        "new_tokens": NEW_TOKENS,
    }


def ask(
    python: str, script: str, jobs: Sequence[dict[str, Any]], scratch: Path, environment: dict[str, str], timeout: float
) -> list[dict[str, Any]]:
    """One process for these jobs; a job without an answer has the last words of the process."""
    scratch.mkdir(parents=True, exist_ok=True)
    asked, answered, log = scratch / "jobs.json", scratch / "results.jsonl", scratch / "log.txt"
    asked.write_text(json.dumps(list(jobs)))
    answered.unlink(missing_ok=True)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as file:
        try:
            subprocess.run(
                [python, str(Path(__file__).with_name(script)), str(asked), str(answered)],
                env=inherited | {"OMP_NUM_THREADS": "1"} | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=False,
            )
            ended = ""
        except subprocess.TimeoutExpired:
            ended = f"no answer in {timeout:g} seconds"
    found = [json.loads(line) for line in answered.read_text().splitlines()] if answered.exists() else []
    by_name = {each["job"]: each for each in found}
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    silent = {"refused": ended or (lines[-1].strip() if lines else "the process ended without a word"), "version": ""}
    return [by_name.get(each["name"], {"job": each["name"], **silent}) for each in jobs]


def scores(folder: Path, sequences: Tensor) -> Tensor:
    """Log-probabilities (sequences, length - 1, vocabulary) by our walk in float32, for the token after each one."""
    walk = Walk(open_any(str(folder)), sequences, Where(torch.device("cpu"), torch.float32))
    for _ in walk:
        pass
    return torch.cat([logits for _, _, logits in walk.logits()]).float().log_softmax(-1)[:, :-1]


def judge(artifact: Artifact, folders: tuple[Path, Path | None], ids: list[list[int]], answer: dict[str, Any]) -> dict[str, Any]:
    """The row of the results for one answer."""
    client = answer["job"].partition(":")[0]
    row = {"artifact": artifact.name, "client": client, "version": answer["version"], "command": artifact.command}
    if "refused" in answer:
        if "ModuleNotFoundError" in answer["refused"]:
            raise RuntimeError(f"{client}: its environment lacks something: {answer['refused']}")
        return judged(row | {"words": one_line(answer["refused"], folders)})
    sequences = torch.cat([torch.tensor(ids), torch.tensor(answer["tokens"])], dim=1)
    model, adapter = folders
    ours = scores(adapter if adapter and adapter.parent != model else model, sequences)
    at = PROMPT_TOKENS - 1
    chosen = ours.gather(-1, sequences[:, 1:, None])[..., 0]
    behind = ours[:, at:].amax(-1) - chosen[:, at:]
    row |= {
        "tokens_equal": int((behind == 0).sum()),
        "tokens": behind.numel(),
        "furthest_token": round(float(behind.max()), 4),
        "generated_difference": _mean(answer["generated"], chosen[:, at:]),
        "prompt_difference": _mean(answer["prompt"], chosen[:, :at]) if answer["prompt"] else None,
    }
    if adapter:
        without = scores(model, sequences) if adapter.parent != model else _without_adapter(model, sequences)
        effect = float((without.gather(-1, sequences[:, 1:, None])[..., 0] - chosen).abs().mean())
        row["effect_of_adapter"] = round(effect, 5)
    return judged(row)


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its bound and its verdict."""
    if "words" in row:
        return row | {"verdict": REFUSED}
    bound = BOUNDS[computed_in(BY_NAME[row["artifact"]], row["client"])]
    if "effect_of_adapter" in row:
        bound = min(bound, max(BOUNDS["float32"], SHARE_OF_EFFECT * row["effect_of_adapter"]))
    row = row | {"bound": round(bound, 5)}
    return row | {"verdict": verdict(row)}


def verdict(row: dict[str, Any]) -> str:
    """Whether the differences are explained by the client's precision; a tie of tokens may be four times as wide."""
    differences = [row["generated_difference"], row["prompt_difference"] or 0.0]
    right = max(differences) <= row["bound"] and row["furthest_token"] <= 4 * row["bound"]
    return RUNS if right else WRONG


def _without_adapter(folder: Path, sequences: Tensor) -> Tensor:
    hidden = folder.parent / f"{folder.name}-without-adapter"
    if not hidden.exists():
        hidden.mkdir()
        for path in folder.iterdir():
            if path.is_file():
                (hidden / path.name).hardlink_to(path)
    return scores(hidden, sequences)


def _mean(theirs: list[list[float]], ours: Tensor) -> float:
    return round(float((torch.tensor(theirs) - ours).abs().mean()), 6)


def one_line(words: str, folders: tuple[Path, Path | None]) -> str:
    """The client's words without our folders, cut to a line."""
    for folder in filter(None, folders):
        words = words.replace(str(folder), "MODEL").replace(str(folder.parent), "FOLDER")
    text = " ".join(words.split())
    return text if len(text) <= WORDS else text[: WORDS - 4] + " ..."


def transformers(python: str, jobs: Sequence[dict[str, Any]], scratch: Path) -> list[dict[str, Any]]:
    """Transformers and peft, one process for all."""
    return ask(python, "client_transformers.py", jobs, scratch, {}, 3600)


def vllm(python: str, one: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """vLLM, a process for each; our plugin is loaded where the client's name says so."""
    allowed = {} if one["client"] == "vllm-plugin" else {"VLLM_PLUGINS": "none"}
    return ask(python, "client_vllm.py", [one], scratch, allowed, 600)[0]


def llama_cpp(pythons: tuple[str, str], converter: Path, one: dict[str, Any], scratch: Path) -> dict[str, Any]:
    """Run llama.cpp after its own converter or after `export gguf`; `converter` is the folder of the sources of either.

    `pythons`: with llama-cpp-python, and with what llama.cpp's converter imports.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    made: list[str | None] = []
    for kind, folder in (("model", one["model"]), ("adapter", one["adapter"])):
        out = scratch / f"{kind}.gguf"
        out.unlink(missing_ok=True)
        if folder is None:
            made.append(None)
            continue
        own = one["client"] == "llama.cpp"
        command = _own_converter(pythons[1], converter, one, kind, out) if own else _our_export(one, kind, out)
        found = os.environ | {"PYTHONPATH": "" if own else str(converter)}
        ended = subprocess.run(command, env=found, cwd=converter, capture_output=True, text=True, check=False)
        if ended.returncode or not out.exists():
            lines = [line for line in ended.stderr.splitlines() if line.strip()] or ["no file and no word"]
            return {"job": one["name"], "version": "", "refused": f"converter: {lines[-1].strip()}"}
        made.append(str(out))
    return ask(pythons[0], "client_llama_cpp.py", [one | {"model": made[0], "adapter": made[1]}], scratch, {}, 600)[0]


def _own_converter(python: str, source: Path, one: dict[str, Any], kind: str, out: Path) -> list[str]:
    if kind == "model":
        script, folder = ["convert_hf_to_gguf.py"], [one["model"]]
    else:
        script, folder = ["convert_lora_to_gguf.py", "--base", one["model"]], [one["adapter"]]
    return [python, str(source / script[0]), *script[1:], *folder, "--outfile", str(out), "--outtype", "f32"]


def _our_export(one: dict[str, Any], kind: str, out: Path) -> list[str]:
    return [sys.executable, "-m", "compresskit", "export", "gguf", one[kind], str(out)]


def can_export(checkout: Path) -> bool:
    """Whether this checkout of ours has `compresskit export gguf`."""
    asked = [sys.executable, "-m", "compresskit", "export", "gguf", "--help"]
    found = os.environ | {"PYTHONPATH": str(checkout)}
    return subprocess.run(asked, env=found, cwd=checkout, capture_output=True, check=False).returncode == 0
