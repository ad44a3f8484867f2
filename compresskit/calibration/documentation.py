"""Text that ships with every Python: `pydoc_data.topics`, the source of `help('for')` and similar."""

from __future__ import annotations

import hashlib
import platform
from typing import Literal

EVALUATION_QUARTER = 0
"""Topics whose hash modulo 4 equals this number are for evaluation."""


Part = Literal["calibration", "evaluation"]
"""Purpose of the text; no topic serves both."""


def builtin_text(part: Part) -> str:
    """About three quarters of the topics are for calibration, the rest for evaluation; none is in both."""
    from pydoc_data.topics import topics

    wanted = part == "evaluation"
    # Some topics have two names; hashing the content puts both into the same part, once.
    texts = dict.fromkeys(topics[name] for name in sorted(topics))
    return "\n\n".join(text for text in texts if _is_for_evaluation(text) == wanted)


def builtin_description(part: Part) -> str:
    """Describe the text, for reports."""
    return f"documentation of Python {platform.python_version()} (pydoc topics, {part} part)"


def _is_for_evaluation(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % 4 == EVALUATION_QUARTER
