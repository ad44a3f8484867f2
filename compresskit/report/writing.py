"""Write a run's reports: report.html, and the model card beside the final model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskit.checkpoint.folder import write_whole
from compresskit.report.card import card
from compresskit.report.collecting import final_model
from compresskit.report.page import page

PAGE = "report.html"
CARD = "README.md"


def write_reports(out: Path, result: Mapping[str, Any]) -> Path:
    """Rewrite the page and the card; returns the page's path."""
    write_whole(out / PAGE, page(out, result))
    name = final_model(out, result)
    if name is not None:
        write_whole(out / name / CARD, card(out, result, name))
    return out / PAGE
