"""What the documentation shows in YAML works: its recipe loads, its CI files parse, their commands and flags exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import typer
import yaml

from compresskit.cli.recipes import add_recipe_commands
from compresskit.cli.stages import evaluate_command
from compresskit.recipe import shipped
from compresskit.recipe.reading import load

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL)


def check_command(line: str) -> None:
    """The command line parses: known command, known flags, enough arguments."""
    program, *arguments = shlex.split(line)
    assert program == "compresskit"
    app = typer.Typer()
    add_recipe_commands(app)
    app.command("evaluate")(evaluate_command())
    group: Any = typer.main.get_command(app)
    command = group.commands[arguments[0]]
    command.make_context(arguments[0], arguments[1:])


def test_the_example_recipe_loads(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(blocks("yaml")[0])
    recipe = load(tmp_path / "recipe.yaml")
    assert [step.title for step in recipe.steps] == ["prune cfsp", "quantize gptq", "compensate eora", "evaluate"]


def test_the_github_example_runs_a_shipped_recipe_and_keeps_the_report() -> None:
    document = yaml.load(blocks("yaml")[1], yaml.BaseLoader)
    assert document["on"] == ["push"]
    steps = document["jobs"]["compress"]["steps"]
    commands = [step["run"] for step in steps if "run" in step and step["run"].startswith("compresskit")]
    assert len(commands) == 1
    check_command(commands[0])
    assert commands[0].split()[2] in shipped.names()
    kept = next(step["with"]["path"] for step in steps if step.get("uses", "").startswith("actions/upload-artifact"))
    assert kept.split() == ["out/report.html", "junit.xml"]
    assert all(("uses" in step) != ("run" in step) for step in steps)


def test_the_gitlab_example_runs_a_shipped_recipe_and_reports_junit() -> None:
    job = yaml.safe_load(blocks("yaml")[2])["compress"]
    command = job["script"][-1]
    check_command(command)
    assert command.split()[2] in shipped.names()
    assert job["artifacts"]["reports"]["junit"] in command
    assert job["artifacts"]["when"] == "always"
