"""The Hub's model card: README.md with metadata, in the folder of the run's final model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from compresskit import __version__
from compresskit.checkpoint.hub import written_name
from compresskit.checkpoint.manifest import chain
from compresskit.checkpoint.small_files import LARGEST_CONFIG_BYTES, read_json
from compresskit.checkpoint.source import DEMO
from compresskit.recipe import verdict
from compresskit.report import collecting
from compresskit.report.serving import ADAPTER_CONFIG, ADAPTER_WEIGHTS, commands
from compresskit.report.source_card import BASE_OF_DEMO, carried

METRICS = {"perplexity": "perplexity", "kl": "KL divergence to the base model", "top1_agreement": "same most likely token"}
"""Figures of an evaluation in the card's metadata, and what they are called there."""


def card(out: Path, result: Mapping[str, Any], name: str) -> str:
    """Text of the card for the model of step `name`."""
    manifest = collecting.manifests(out, result)[name]
    stages = [f"{link['stage']} {link['method']}" for link in reversed(chain(manifest))]
    report = next((each.report for each in reversed(collecting.measured(result)) if each.of == name), None)
    base = BASE_OF_DEMO if result["source"] == DEMO else str(result["source"])
    metadata = _printable(_metadata(out / name, str(result["source"]), manifest, report))
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False).rstrip(), "---", ""]
    made = f"{base}, by compresskit {__version__}: {', then '.join(stages)}."
    lines += [f"# {verdict.in_markdown(Path(base).name)}, compressed", "", verdict.in_markdown(made), ""]
    if report is not None:
        lines += [verdict.sentence({**result, "steps": {name: report}}), ""]
        lines += ["| | before | after |", "| --- | ---: | ---: |"]
        for title, key in (("bytes", "bytes"), ("parameters", "parameters"), ("perplexity", "perplexity")):
            before = report.get(f"reference_{key}")
            lines.append(f"| {title} | {'' if before is None else f'{before:,.10g}'} | {report[key]:,.10g} |")
        lines += ["", verdict.in_markdown(f"Measured on: {report['text']} ({report['tokens']} tokens)."), ""]
    for title, text in commands(out / name).items():
        fence = _fence(text)
        lines += [f"## {title}", "", f"{fence}{'python' if title.startswith('transformers') else 'console'}", text, fence, ""]
    return "\n".join(lines)


def _fence(text: str) -> str:
    """More backticks than stand together anywhere in the text."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))


def _printable(value: Any) -> Any:
    """Metadata whose texts are single lines."""
    if isinstance(value, dict):
        return {key: _printable(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_printable(each) for each in value]
    return verdict.one_line(value) if isinstance(value, str) else value


def _metadata(folder: Path, source: str, manifest: Mapping[str, Any], report: Mapping[str, Any] | None) -> dict[str, Any]:
    base = BASE_OF_DEMO if source == DEMO else source
    found: dict[str, Any] = {}
    if name := written_name(base):
        found |= {"base_model": name, "base_model_relation": relation(folder, manifest)}
    if (folder / "config.json").is_file() or (folder / ADAPTER_WEIGHTS).is_file():  # a ternary file is for no library
        found["library_name"] = "peft" if (folder / ADAPTER_CONFIG).is_file() else "transformers"
    found["pipeline_tag"] = "text-generation"
    found["tags"] = ["compresskit", *dict.fromkeys(str(link["method"]) for link in chain(dict(manifest)))]
    found |= carried(source)
    if "license" not in found and (folder / "LICENSE").is_file():
        found |= {"license": "other", "license_name": "see-license-file", "license_link": "LICENSE"}
    if report is not None:
        found["model-index"] = [{"name": folder.name, "results": [_measured(report)]}]
    return found


def relation(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What the model is to its base, in the Hub's words."""
    if (folder / ADAPTER_CONFIG).is_file():
        return "adapter"
    config = folder / "config.json"
    if config.is_file() and read_json(config, LARGEST_CONFIG_BYTES).get("quantization_config"):
        return "quantized"
    return "merge" if manifest["stage"] == "merge" else "finetune"


def _measured(report: Mapping[str, Any]) -> dict[str, Any]:
    """An evaluation as a result of the Hub's model index."""
    metrics = [
        {"type": key, "value": report[key], "name": f"{name} ({report['text']})"}
        for key, name in METRICS.items()
        if report.get(key) is not None
    ]
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": report["text"], "type": "text"},
        "metrics": metrics,
    }
