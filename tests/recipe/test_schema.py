"""recipe/schema.py: the schema that editors read agrees with the loader and with the shipped recipes. Oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from compresskit.cli.main import main
from compresskit.methods import METHODS
from compresskit.recipe import shipped
from compresskit.recipe.schema import schema

ROOT = Path(__file__).parents[2]


def test_the_shipped_schema_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["schema"])
    printed = capsys.readouterr().out
    assert json.loads(printed) == schema()
    assert (ROOT / "recipes" / "schema.json").read_text() == printed


def test_the_schema_holds_every_setting_with_its_help() -> None:
    found = schema()
    titles = {each["title"]: each for each in found["properties"]["steps"]["items"]["anyOf"]}
    assert {f"{stage} {method}" for stage, methods in METHODS.items() for method in methods} | {
        "evaluate",
        "expand",
        "search",
        "pack",
    } == set(titles)
    sparsity = titles["prune cfsp"]["properties"]["sparsity"]
    assert sparsity["description"] == "Share of the FFN channels to remove."
    assert "overwrite" not in titles["prune cfsp"]["properties"]
    assert titles["compensate eora"]["required"] == ["original"]


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    kind = jsonschema.validators.validator_for(schema())
    kind.check_schema(schema())
    return kind(schema())


@pytest.mark.parametrize("name", shipped.names())
def test_the_schema_accepts_the_shipped_recipes(name: str, validator: Any) -> None:
    validator.validate(yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()))
