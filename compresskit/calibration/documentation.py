"""The prose that every Python brings along: `pydoc_data.topics`, the text behind `help('for')` and the like."""

from __future__ import annotations

import hashlib
import platform
from typing import Literal

EVALUATION_QUARTER = 0
"""Topics whose hash modulo 4 is this number are the evaluation part."""


Part = Literal["calibration", "evaluation"]
"""What the text is for: no topic serves both."""


def builtin_text(part: Part) -> str:
    """About three quarters of the topics for calibration, the rest for evaluation; no topic is in both."""
    from pydoc_data.topics import topics

    wanted = part == "evaluation"
    # Some topics are there under two names; by content they fall into the same part, and are taken once.
    texts = dict.fromkeys(topics[name] for name in sorted(topics))
    return "\n\n".join(text for text in texts if _is_for_evaluation(text) == wanted)


def builtin_description(part: Part) -> str:
    """What text that is, for reports."""
    return f"documentation of Python {platform.python_version()} (pydoc topics, {part} part)"


def _is_for_evaluation(text: str) -> bool:
    return hashlib.sha256(text.encode()).digest()[0] % 4 == EVALUATION_QUARTER
