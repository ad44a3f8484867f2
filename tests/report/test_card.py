"""report/card.py: the model card has the metadata that the hub reads, and texts from files stay texts.

Oracles: a YAML parser, a Markdown parser, and the Hub's own client.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzz_runs import EVALUATED, result_of
from hostile_runs import HOSTILE, hostile_run
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from compresskit.report.card import card, relation


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


def test_the_hub_s_client_reads_the_card_and_its_results(tmp_path: Path) -> None:
    folder = tmp_path / "quantize"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"bits": 4}}))
    (folder / "compresskit.json").write_text(json.dumps({"stage": "quantize", "method": "gptq", "facts": {}, "source": None}))
    steps = {"quantize": {"stage": "quantize", "method": "gptq"}, "e": EVALUATED | {"source": "quantize", "adapter": None}}
    result = result_of(tmp_path, steps) | {"source": "demo:smollm2-135m"}
    found = ModelCard(card(tmp_path, result, "quantize")).data
    assert (found.base_model, found.base_model_relation) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "quantized")
    assert (found.library_name, found.pipeline_tag) == ("transformers", "text-generation")
    assert (found.license, found.language, found.tags) == ("apache-2.0", ["en"], ["compresskit", "gptq"])
    assert found.model_name == "quantize"
    measured = {each.metric_type: each for each in found.eval_results}
    assert {name: each.metric_value for name, each in measured.items()} == {"perplexity": 20.5, "kl": 0.5, "top1_agreement": 0.75}
    assert {(each.task_type, each.dataset_name) for each in measured.values()} == {("text-generation", "a text")}
    assert yaml.safe_load(found.to_yaml())["model-index"][0]["results"]


@pytest.mark.parametrize(
    ("stage", "files", "expected"),
    [
        ("prune", {"config.json": "{}"}, "finetune"),
        ("recover", {"config.json": "{}"}, "finetune"),
        ("compensate", {"config.json": "{}"}, "finetune"),  # an adapter that was merged
        ("compensate", {"adapter_config.json": "{}"}, "adapter"),
        ("quantize", {"config.json": '{"quantization_config": {"bits": 4}}'}, "quantized"),
        ("quantize", {"adapter_config.json": "{}"}, "adapter"),
        ("merge", {"adapter_config.json": "{}"}, "adapter"),
        ("merge", {"config.json": "{}"}, "merge"),
    ],
)
def test_the_relation_to_the_base_is_in_the_hub_s_words(stage: str, files: dict[str, str], expected: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert relation(tmp_path, {"stage": stage}) == expected


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
    shown = 2 if adapter else 3  # an adapter's base is elsewhere, so nothing is known of llama.cpp
    assert sum(token.type == "heading_open" for token in tokens) == 1 + shown
    assert sum(token.type == "fence" for token in tokens) == shown
    assert sum(token.type == "tr_open" for token in tokens) == 4
