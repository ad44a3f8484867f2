"""What vLLM makes of one checkpoint: run by client_runs.py in vLLM's own environment.

python client_vllm.py JOBS.json RESULTS.jsonl
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

LARGEST_LENGTH = 512


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and log-probabilities of the prompts and of these tokens; with a LoRA, of these tokens alone."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    dtype = job["dtype"] if job["dtype"] == "float32" else "auto"  # which is bfloat16 on a CPU, whatever is stored
    lora = {"enable_lora": True, "max_lora_rank": job["rank"]} if job["adapter"] else {}
    engine = LLM(
        job["model"],
        trust_remote_code=job["trust"],
        dtype=dtype,
        enforce_eager=True,
        max_model_len=LARGEST_LENGTH,
        max_num_seqs=8,
        **lora,
    )
    # vLLM on a CPU crashes on log-probabilities of prompts with a LoRA, whoever made it
    prompt = {} if job["adapter"] else {"prompt_logprobs": 0}
    sampling = SamplingParams(temperature=0, max_tokens=job["new_tokens"], ignore_eos=True, logprobs=0, **prompt)
    request = LoRARequest("repair", 1, job["adapter"]) if job["adapter"] else None
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in job["prompts"]], sampling, use_tqdm=False, lora_request=request
    )
    found: dict[str, Any] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
    found["generated"] = [_chosen(output.outputs[0].logprobs, output.outputs[0].token_ids) for output in outputs]
    found["prompt"] = None
    if prompt:
        found["prompt"] = [_chosen(output.prompt_logprobs[1:], output.prompt_token_ids[1:]) for output in outputs]
    return found


def _chosen(places: Any, tokens: Any) -> list[float]:
    return [place[token].logprob for place, token in zip(places, tokens, strict=True)]


def main(jobs: str, results: str) -> None:
    """One JSON line a job: answers, or the words of a refusal."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ["VLLM_CPU_INT4_W4A8"] = "0"  # which rounds activations to 8 bits on processors with AMX
    from importlib.metadata import distributions

    version = next(each.version for each in distributions() if each.metadata["Name"] in ("vllm", "vllm-cpu"))
    for job in json.loads(Path(jobs).read_text()):
        try:
            found = answers(job)
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        with Path(results).open("a") as file:
            file.write(json.dumps({"job": job["name"], "version": version, **found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
