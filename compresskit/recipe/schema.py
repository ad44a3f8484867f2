"""JSON Schema of recipes, built from the method classes, for completion and checks in editors. No torch."""

from __future__ import annotations

from typing import Any

from compresskit.methods import METHODS, STAGES, method_class, options_class
from compresskit.recipe.steps import RUN_DECIDES

DRAFT = "https://json-schema.org/draft/2020-12/schema"
VARIABLE = {"type": "string", "pattern": r"\$\{[^${}]+\}"}
"""Any setting may be a variable, a matrix value, or a reference."""


def schema() -> dict[str, Any]:
    """Build the schema; every step is a stage with the settings of its method."""
    definitions: dict[str, Any] = {}
    steps = []
    for stage in (name for name in STAGES if " " not in name):
        for method in METHODS.get(stage, {None: None}):
            steps.append(_step(stage, method, definitions))
    text, anything = {"type": "string"}, {"type": "object"}
    return {
        "$schema": DRAFT,
        "title": "compresskit recipe",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "description": {**text, "description": "What the recipe is for."},
            "source": {**text, "description": "What the first step reads: a folder, a Hub id, or demo:smollm2-135m."},
            "variables": {**anything, "description": "Names with default values, used as ${name}, replaced by --set name=value."},
            "defaults": {**anything, "description": "Settings of every step that knows them."},
            "matrix": {
                **anything,
                "description": "Names with lists of values; steps that use ${name} are copied for each.",
                "additionalProperties": {"anyOf": [{"type": "array", "minItems": 1}, text]},
            },
            "steps": {"type": "array", "minItems": 1, "items": {"anyOf": steps}, "description": "What to do, in order."},
            "gates": {"type": "array", "items": text, "description": "Limits for the last evaluation: perplexity_ratio<=1.2."},
            "include": {**text, "description": "Another recipe, whose steps come first."},
        },
        "$defs": definitions,
    }


def _step(stage: str, method: str | None, definitions: dict[str, Any]) -> dict[str, Any]:
    classes = ([method_class(stage, method)] if method else []) + [options_class(stage, method or "")]
    settings: dict[str, Any] = {}
    required: list[str] = []
    for each in classes:
        found = each.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= found.get("$defs", {})
        for name, value in found["properties"].items():
            if name not in RUN_DECIDES:
                described = {"description": value["description"]} if "description" in value else {}
                settings[name] = {"anyOf": [value, VARIABLE], **described}
        required += found.get("required", [])
    sources = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    own = {
        "name": {"type": "string", "description": "How later steps name it, and the folder it writes."},
        "source": {**sources, "description": "What it reads; left out, what the step before it wrote."},
        **settings,
    }
    named = {"const": method} if method else {"type": "null"}
    long = {"stage": {"const": stage}, **({"method": {"const": method}} if method else {})}
    return {
        "type": "object",
        "title": f"{stage} {method or ''}".strip(),
        "additionalProperties": False,
        "properties": {stage: {**named, "description": STAGES[stage].summary}, **long, **own},
        "required": required,
        "oneOf": [{"required": [stage]}, {"required": list(long)}],
    }
