"""compresskit: make Hugging Face language models smaller, stage by stage, in a few blocks' memory."""

from compresskit.version import VERSION

__all__ = ["__version__", "register"]
__version__ = VERSION


def register() -> None:
    """Let transformers load our ragged checkpoints without `trust_remote_code` (see ragged.py)."""
    from compresskit.ragged import register as register_classes

    register_classes()
