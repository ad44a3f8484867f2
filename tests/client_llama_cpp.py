"""What llama.cpp makes of GGUF files: run by client_runs.py in an environment with llama-cpp-python.

python client_llama_cpp.py JOBS.json RESULTS.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and log-probabilities of the prompts and of these tokens."""
    import numpy as np
    from llama_cpp import Llama

    engine = Llama(job["model"], lora_path=job["adapter"], logits_all=True, n_ctx=512, n_threads=1, verbose=False)
    found: dict[str, list[Any]] = {"tokens": [], "prompt": [], "generated": []}
    for prompt in job["prompts"]:
        engine.reset()
        whole = list(prompt)
        engine.eval(prompt)
        for _ in range(job["new_tokens"]):
            whole.append(int(np.argmax(engine.scores[len(whole) - 1])))
            engine.eval(whole[-1:])
        scores = engine.scores[: len(whole) - 1].astype(np.float64)
        shifted = scores - scores.max(-1, keepdims=True)
        each = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))[np.arange(len(whole) - 1), whole[1:]].tolist()
        found["tokens"].append(whole[len(prompt) :])
        found["prompt"].append(each[: len(prompt) - 1])
        found["generated"].append(each[len(prompt) - 1 :])
    return found


def main(jobs: str, results: str) -> None:
    """One JSON line a job: answers, or the words of a refusal."""
    from importlib.metadata import version

    for job in json.loads(Path(jobs).read_text()):
        try:
            found: dict[str, Any] = answers(job)
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        with Path(results).open("a") as file:
            file.write(json.dumps({"job": job["name"], "version": version("llama-cpp-python"), **found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
