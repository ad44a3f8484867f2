"""A run's folder whose every text wants to be something else: HTML, Markdown, YAML, a shell's command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HOSTILE = "a'b\"c`d``` $(touch x)|<script>alert(1)</script>\n---\nlicense: mit\n# *h*\n![i](http://w/i)\x1b[2J&lt;"


def hostile_run(out: Path, text: str = HOSTILE, adapter: bool = False) -> dict[str, Any]:
    """Write the folder of a run with one pruned and measured model, and return the run's result."""
    folder = out / "prune"
    folder.mkdir(parents=True)
    if adapter:
        (folder / "adapter_config.json").write_text(json.dumps({"r": 8, "base_model_name_or_path": text}))
        (folder / "adapter_model.safetensors").write_bytes(b"")
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": {"AutoModel": text}}))
    manifest = {
        "stage": text, "method": text, "source": None, "inputs": {"sha256": {text: text}},
        "outputs": {"sha256": {"model.safetensors": text}},
        "facts": {
            "widths": [[8], [4]], "losses": [2.0, 1.0], "blocks": [{"error": 0.5}, {"error": 0.25}],
            "clusters": [{"name": text, "share": 0.5}, {"name": "b", "share": 0.5}],
        },
    }  # fmt: skip
    (folder / "compresskit.json").write_text(json.dumps(manifest))
    report = {
        "stage": "evaluate", "source": str(folder), "text": text, "tokens": 10, "bytes": 10, "parameters": 10,
        "perplexity": 2.0, "reference_bytes": 20, "reference_perplexity": 1.5, "perplexity_ratio": 1.3,
        "size_ratio_16bit": 0.5, "tasks": {text: {text: 0.5}}, "warning": text,
        "generations": [{"prompt": text, "before": f"same {text}", "after": f"same other {text}"}],
    }  # fmt: skip
    gate = {
        "step": "evaluate", "metric": text, "operator": "<=", "limit": 1.0, "value": 2.0, "passed": False, "missed_by": 1.0,
    }  # fmt: skip
    steps = {"prune": {"stage": text, "method": text, "bytes_after": 10, "seconds": 1.0}, "evaluate": report}
    places = {"recipe": f"{text}.yaml", "output": text, "source": text}
    return {**places, "steps": steps, "gates": [gate], "passed": False, "seconds": 1.0}
