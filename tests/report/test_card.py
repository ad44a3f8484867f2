"""report/card.py: the model card has the metadata that the hub reads. Oracle: a YAML parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def test_the_model_card_has_metadata_that_the_hub_reads(out: Path) -> None:
    card = (out / "compensate-bits-4" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(head)
    assert metadata["library_name"] == "peft"
    assert metadata["tags"] == ["compresskit", "eora", "apiq", "cfsp"]
    metric = metadata["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "perplexity"
    assert metric["value"] > 1
    assert "prune cfsp, then quantize apiq, then compensate eora" in body
    assert f"PeftModel.from_pretrained(model, '{out}/compensate-bits-4')" in body
