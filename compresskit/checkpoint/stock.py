"""Load a whole model with transformers, for work that needs all blocks in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from compresskit.errors import RequestError


def load_whole(
    folder: Path, dtype: torch.dtype, trust_remote_code: bool = False, gguf_file: str | None = None
) -> PreTrainedModel:
    """Load a folder's causal language model on the CPU in evaluation mode; prints nothing on standard output."""
    special: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    with quiet():
        network: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trust_remote_code, **special
        )
    return network.eval()


def add_adapter(network: PreTrainedModel, folder: Path) -> None:
    """Attach a PEFT adapter in place; raises RequestError if peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise RequestError(f"{folder}: running an adapter takes peft; pip install 'compresskit[peft]'")
    with quiet():
        network.load_adapter(str(folder))


def next_logits(network: nn.Module, tokens: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Any]:
    """Run more tokens (batch, length) after those in the cache (None at the start).

    transformers 5.24 renamed the argument and the output `past_key_values` to `cache`.

    Returns:
        (logits (batch, length, vocabulary), or fewer positions if the options say so; the cache including these tokens).
    """
    name = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"
    output = network(input_ids=tokens, use_cache=True, **{name: cache}, **options)
    return output.logits, getattr(output, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and warnings; its prints go to standard error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
