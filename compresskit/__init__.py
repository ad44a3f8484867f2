"""compresskit: make Hugging Face language models smaller, stage by stage, in a few blocks' memory."""

TYPE_CHECKING = False  # typing's own: the import takes longer than all that the command line does before it hears a signal
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"
__all__ = [
    "__version__", "compensate", "evaluate", "expand", "export", "pack", "prune", "quantize", "recover", "register", "run",
    "search",
]  # fmt: skip


def __getattr__(name: str) -> "Any":
    """Import stages, `run` and `register` from `compresskit.api` on first use."""
    if name in __all__:
        import importlib

        return getattr(importlib.import_module("compresskit.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
