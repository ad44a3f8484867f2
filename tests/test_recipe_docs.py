"""What the documentation shows in YAML works: its recipe loads, its CI files parse, their commands and flags exist."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
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


def pods(spec: dict[str, Any]) -> dict[str, Any]:
    """The pod specifications of a Ray cluster, by the name of their group."""
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]} | {"head": spec["headGroupSpec"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def test_the_kubernetes_example_is_a_job_of_kuberay_whose_pods_share_the_folder_that_it_names() -> None:
    """Required fields: KubeRay's types rayjob_types.go and raycluster_types.go, and those of Kubernetes for pods."""
    job = yaml.safe_load((DOCS.parent / "kubernetes" / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,45}[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"].keys() <= {"entrypoint", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    check_command(job["spec"]["entrypoint"])
    shared = {"/" + word.split("/")[1] for word in job["spec"]["entrypoint"].split() if word.startswith("/")}
    cluster = job["spec"]["rayClusterSpec"]
    assert isinstance(cluster["rayVersion"], str)
    assert isinstance(cluster["headGroupSpec"]["rayStartParams"]["num-cpus"], str)
    for group in cluster["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert group["rayStartParams"] is not None
    images = set()
    for name, pod in pods(cluster).items():
        (container,) = pod["containers"]
        images.add(container["image"])
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == shared, name
        claimed = {volume["name"] for volume in pod["volumes"] if "claimName" in volume["persistentVolumeClaim"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == claimed, name
        assert container["resources"]["limits"] == container["resources"]["requests"], name
    assert len(images) == 1, "all pods have the same versions"
    dockerfile = (DOCS.parent / "kubernetes" / "Dockerfile").read_text()
    assert f"rayproject/ray:{cluster['rayVersion']}-" in dockerfile


@pytest.mark.parametrize("name", ["ray.sbatch", "cells.sbatch"])
def test_the_slurm_examples_are_scripts_whose_command_parses(name: str) -> None:
    file = DOCS.parent / "slurm" / name
    subprocess.run(["/bin/bash", "-n", file], check=True)
    text = file.read_text().replace("\\\n", " ")
    assert text.startswith("#!/usr/bin/env bash\n")
    options = re.findall(r"^#SBATCH (--[\w-]+)=?", text, re.MULTILINE)
    assert {"--job-name", "--cpus-per-task", "--mem", "--time"} <= set(options)
    command = "compresskit " + text.partition(" compresskit ")[2].splitlines()[0]
    check_command(re.sub(r"\$\w+", "1", command))
