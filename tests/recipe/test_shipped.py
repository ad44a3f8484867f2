"""Every shipped recipe loads, and the schema that editors read agrees with the loader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from compresskit.cli.main import main
from compresskit.methods import METHODS
from compresskit.recipe import shipped
from compresskit.recipe.reading import load
from compresskit.recipe.schema import schema

ROOT = Path(__file__).parents[2]
WANTED = {
    "demo", "cfsp", "gptq", "apiq", "eora", "compeft", "paser", "half-the-size", "3-bit", "2-bit", "faster-on-cpu",
    "adapter-zoo", "ci-gate",
}  # fmt: skip


def stages_of(name: str) -> list[tuple[str, str | None]]:
    document = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    first = [next(key for key in step if key not in ("name", "source")) for step in document["steps"]]
    return [(key, step[key]) for key, step in zip(first, document["steps"], strict=True)]


def skip_where_a_stage_is_missing(name: str) -> None:
    for stage, method in stages_of(name):
        if stage != "evaluate" and method not in METHODS.get(stage, {}):
            pytest.skip(f"{stage} {method} is not in the table of methods yet")


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_shipped_recipe_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_where_a_stage_is_missing(name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "one").mkdir(parents=True)
    recipe = load(shipped.find(name))
    assert recipe.description
    assert recipe.steps


def test_the_list_names_every_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(shipped.names()) == WANTED
    with pytest.raises(SystemExit):
        main(["run", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == WANTED
    assert all(len(line.split()) > 3 for line in lines)


def test_every_shipped_recipe_refers_to_the_schema() -> None:
    for name in WANTED:
        first = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=./schema.json"


def test_the_shipped_schema_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["schema"])
    printed = capsys.readouterr().out
    assert json.loads(printed) == schema()
    assert (ROOT / "recipes" / "schema.json").read_text() == printed


def test_the_schema_holds_every_setting_with_its_help() -> None:
    found = schema()
    titles = {each["title"]: each for each in found["properties"]["steps"]["items"]["anyOf"]}
    assert {f"{stage} {method}" for stage, methods in METHODS.items() for method in methods} | {"evaluate", "expand"} == set(
        titles
    )
    sparsity = titles["prune cfsp"]["properties"]["sparsity"]
    assert sparsity["description"] == "Share of the FFN channels to remove."
    assert "overwrite" not in titles["prune cfsp"]["properties"]
    assert titles["compensate eora"]["required"] == ["original"]


@pytest.mark.parametrize("name", sorted(WANTED))
def test_the_schema_accepts_the_shipped_recipes(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    skip_where_a_stage_is_missing(name)
    jsonschema.validate(yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text()), schema())
