"""compresskit: make Hugging Face language models smaller, stage by stage, in a few blocks' memory."""

import importlib
from typing import Any

from compresskit.version import VERSION

STAGE_NAMES = ("prune", "quantize", "compensate", "recover", "evaluate")
__all__ = ["__version__", "compensate", "evaluate", "prune", "quantize", "recover", "register", "run"]
__version__ = VERSION


def register() -> None:
    """Let transformers load our ragged checkpoints without `trust_remote_code` (see ragged.py)."""
    from compresskit.ragged import register as register_classes

    register_classes()


def __getattr__(name: str) -> Any:
    """The stages, which are the rooms of their methods (see calling.py), and `run`; imported when first asked for."""
    if name in STAGE_NAMES:
        return importlib.import_module(f"compresskit.{name}")
    if name == "run":
        return importlib.import_module("compresskit.api").run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
