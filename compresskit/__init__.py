"""compresskit: make Hugging Face language models smaller, stage by stage, in a few blocks' memory."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "compensate", "evaluate", "prune", "quantize", "recover", "register", "run"]


def __getattr__(name: str) -> Any:
    """Import stages, `run` and `register` from `compresskit.api` on first use."""
    if name in __all__:
        return getattr(importlib.import_module("compresskit.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
