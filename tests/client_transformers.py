"""What transformers and peft make of checkpoints: run by client_runs.py in an environment that holds them; no code of ours.

python client_transformers.py JOBS.json RESULTS.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def network(job: dict[str, Any]) -> Any:
    """The model, with its adapter attached by the client that the job names."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", trust_remote_code=job["trust"])
    if job["adapter"] and job["client"] == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["adapter"])
    elif job["adapter"]:
        model.load_adapter(job["adapter"])
    return model.eval()


def answers(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens and log-probabilities of the prompts and of these tokens."""
    import torch

    model = network(job)
    model.generation_config.eos_token_id = None  # as many tokens from everyone
    prompts = torch.tensor(job["prompts"])
    with torch.no_grad():
        whole = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=job["new_tokens"], do_sample=False, pad_token_id=0
        )
        scores = model(whole).logits.float().log_softmax(-1)[:, :-1]
    chosen = scores.gather(-1, whole[:, 1:, None])[..., 0]
    at = prompts.shape[1]
    return {"tokens": whole[:, at:].tolist(), "prompt": chosen[:, : at - 1].tolist(), "generated": chosen[:, at - 1 :].tolist()}


def versions() -> dict[str, str]:
    import peft
    import transformers

    return {"transformers": transformers.__version__, "peft": peft.__version__}


def main(jobs: str, results: str) -> None:
    """One JSON line a job: answers, or the words of a refusal."""
    sys.modules["compresskit"] = None  # type: ignore[assignment]  # stock tools alone must do
    known = versions()
    for job in json.loads(Path(jobs).read_text()):
        try:
            found = answers(job)
        except Exception as error:
            found = {"refused": f"{type(error).__name__}: {error}"}
        with Path(results).open("a") as file:
            file.write(json.dumps({"job": job["name"], "version": known[job["client"]], **found}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
