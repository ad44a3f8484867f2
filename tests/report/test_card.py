"""report/card.py: the model card has the metadata that the hub reads, and texts from files stay texts.

Oracles: a YAML parser and a Markdown parser.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile_runs import HOSTILE, hostile_run
from markdown_it import MarkdownIt

from compresskit.report.card import card


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


@pytest.mark.parametrize("text", [HOSTILE, "- item", "1. item", "```\n# x", "a\n---\nlicense: mit", "=== --- +++", "|a|b|"])
@pytest.mark.parametrize("adapter", [False, True])
def test_texts_from_files_are_neither_metadata_nor_markup(text: str, adapter: bool, tmp_path: Path) -> None:
    found = card(tmp_path, hostile_run(tmp_path, text, adapter), "prune")
    assert found.startswith("---\n")
    head, body = found[4:].split("\n---\n", 1)
    metadata: dict[str, Any] = yaml.safe_load(head)
    assert set(metadata) == {"library_name", "pipeline_tag", "tags", "model-index"}
    assert all("\n" not in tag and tag.isprintable() for tag in metadata["tags"])
    tokens = MarkdownIt().enable("table").parse(body)
    kinds = {each.type for token in tokens for each in (token, *(token.children or []))}
    usual = {"heading", "paragraph", "table", "thead", "tbody", "tr", "th", "td"}
    assert kinds <= {f"{kind}_{end}" for kind in usual for end in ("open", "close")} | {"inline", "text", "fence", "text_special"}
    assert sum(token.type == "heading_open" for token in tokens) == 3
    assert sum(token.type == "fence" for token in tokens) == 2
    assert sum(token.type == "tr_open" for token in tokens) == 4
