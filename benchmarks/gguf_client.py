"""What llama.cpp makes of GGUF files: log-probabilities, greedy tokens, tokens of texts. Run by gguf_files.py.

ENVIRONMENT_WITH_LLAMA_CPP_PYTHON/bin/python benchmarks/gguf_client.py < request.json > answer.json
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from llama_cpp import Llama

F32 = 0
"""ggml's number of the type; keys and values in float32, so that only the weights are compared."""


def opened(asked: dict[str, Any], **options: Any) -> Llama:
    context = max((len(each) for each in asked["windows"]), default=64) + asked["greedy"] + 8
    given = {"lora_path": asked["adapter"]} if asked.get("adapter") else {}
    return Llama(
        asked["model"], n_ctx=context, n_batch=context, n_ubatch=context, logits_all=True, verbose=False,
        n_threads=asked["threads"], n_threads_batch=asked["threads"], type_k=F32, type_v=F32, use_mmap=True, **given, **options,
    )  # fmt: skip


def log_probabilities(model: Llama, window: list[int]) -> list[float]:
    model.reset()
    model.eval(window)
    scores = np.array(model.scores[: len(window) - 1], dtype=np.float64)
    scores -= scores.max(axis=1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return [float(each[token]) for each, token in zip(scores, window[1:], strict=True)]


def greedy(model: Llama, prompt: list[int], count: int) -> list[int]:
    model.reset()
    model.eval(prompt)
    found: list[int] = []
    for _ in range(count):
        found.append(int(np.argmax(model.scores[len(prompt) + len(found) - 1])))
        model.eval(found[-1:])
    return found


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    try:
        model = opened(asked)
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}
    return {
        "log_probabilities": [log_probabilities(model, each) for each in asked["windows"]],
        "greedy": [greedy(model, each, asked["greedy"]) for each in asked["prompts"]],
        "tokens": [model.tokenize(text.encode(), add_bos=True, special=True) for text in asked["texts"]],
    }


if __name__ == "__main__":
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
