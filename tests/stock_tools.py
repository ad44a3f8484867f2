"""Logits of checkpoint folders by stock transformers, in a process that cannot import compresskit, and by our own walk."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny_models import VOCABULARY

from compresskit.machine.device import Where
from compresskit.models.load import open_any
from compresskit.walk.walk import Walk

SERVER = """
import json, os, sys, traceback
sys.modules["compresskit"] = None
import torch, bitsandbytes, compressed_tensors, peft, transformers
import transformers.models.llama.modeling_llama, transformers.quantizers.auto
for line in sys.stdin:
    script, arguments, folder, log = json.loads(line)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            os.chdir(folder)
            exec(script, {"arguments": arguments})
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(os.waitpid(child, 0)[1], flush=True)
"""
LOADER = """
import json, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
tokens = torch.load(arguments[0])
for folder in arguments[1:]:
    alone = Path(folder, "adapter_config.json")
    base = json.loads(alone.read_text())["base_model_name_or_path"] if alone.is_file() else folder
    adapter = folder if alone.is_file() else folder + "/adapter"
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=True).eval()
    if Path(adapter).is_dir():
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, adapter).eval()
    for module in model.modules():  # bitsandbytes' kernel for such processors computes in bfloat16, and takes no narrow layers
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        torch.save(model(tokens).logits, folder + ".logits")
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """A process that has stock tools imported, never compresskit, and forks a process for every script; it ends with us."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


def run_stock(script: str, arguments: list[str], scratch: Path) -> None:
    """Run a script, which finds `arguments`, where stock tools are imported and compresskit cannot be."""
    log = scratch / "stock.log"
    stream_in, stream_out = server().stdin, server().stdout
    assert stream_in is not None and stream_out is not None
    stream_in.write(json.dumps([script, arguments, str(scratch), str(log)]) + "\n")
    stream_in.flush()
    assert stream_out.readline() == "0\n", log.read_text()[-3000:] if log.exists() else "the server of stock tools has ended"


def tokens() -> torch.Tensor:
    """Two windows of 40 byte tokens."""
    return torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(7))


def walked_logits(folder: Path) -> torch.Tensor:
    """By our walk, with the adapter that lies in the folder, or on its base where the folder is an adapter."""
    walk = Walk(open_any(str(folder)), tokens(), Where(torch.device("cpu"), torch.float32))
    for _ in walk:
        pass
    return torch.cat([logits for _, _, logits in walk.logits()])


def stock_logits(folders: list[Path], scratch: Path) -> list[torch.Tensor]:
    """By transformers and, where there is an adapter, peft."""
    torch.save(tokens(), scratch / "tokens.pt")
    run_stock(LOADER, [str(scratch / "tokens.pt"), *map(str, folders)], scratch)
    return [torch.load(f"{folder}.logits") for folder in folders]
