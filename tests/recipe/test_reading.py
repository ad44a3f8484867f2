"""recipe/reading.py: a recipe becomes the settings that the command line builds. Against hand-written expectations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.pruning.cfsp import CFSP
from compresskit.quantization.gptq import GPTQ
from compresskit.recipe.located import RecipeError
from compresskit.recipe.reading import Recipe, load
from compresskit.stages import Options


def recipe(folder: Path, content: str, **given: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(content)
    return load(path, given)


def test_a_step_is_the_typed_object_of_the_command_line(tmp_path: Path) -> None:
    (step,) = recipe(tmp_path, "source: m\nsteps: [{prune: cfsp, sparsity: 0.3, samples: 8, seed: 1}]").steps
    assert step.method == CFSP(sparsity=0.3)
    assert step.options == Options(samples=8, seed=1)
    assert (step.name, step.title, step.sources) == ("prune", "prune cfsp", ("m",))


def test_both_spellings_of_a_step_are_one(tmp_path: Path) -> None:
    short = recipe(tmp_path, "source: m\nsteps: [{quantize: gptq, bits: 3}]").steps[0]
    long = recipe(tmp_path, "source: m\nsteps: [{stage: quantize, method: gptq, bits: 3}]").steps[0]
    assert short.method == long.method == GPTQ(bits=3)


def test_a_step_reads_the_last_model_unless_it_names_another(tmp_path: Path) -> None:
    text = """
source: m
steps:
  - {name: small, prune: cfsp}
  - {evaluate: , against: source}
  - {name: tiny, quantize: gptq}
  - {evaluate: , source: small, against: "${source}"}
  - {compensate: eora, source: "${tiny}", original: small}
"""
    small, first, tiny, second, repair = recipe(tmp_path, text).steps
    assert [step.sources for step in (small, first, tiny)] == [("m",), ("${small}",), ("${small}",)]
    assert (second.name, second.sources, second.options.model_dump()["against"]) == ("evaluate-2", ("${small}",), "m")
    assert repair.references == ["tiny", "small"]


def test_defaults_reach_the_steps_that_know_them_and_the_step_wins(tmp_path: Path) -> None:
    text = "source: m\ndefaults: {samples: 4, bits: 3}\nsteps: [{prune: cfsp}, {quantize: gptq, samples: 9}, {evaluate: }]"
    prune, quantize, _ = recipe(tmp_path, text).steps
    assert prune.options.model_dump()["samples"] == 4
    assert quantize.options.model_dump()["samples"] == 9
    assert quantize.method == GPTQ(bits=3)


def test_a_matrix_copies_only_the_steps_that_depend_on_it(tmp_path: Path) -> None:
    text = """
source: m
matrix: {bits: [2, 3], group: [32, 64]}
steps:
  - {prune: cfsp}
  - {quantize: gptq, bits: "${bits}", group_size: "${group}"}
  - {evaluate: , against: source}
gates: [perplexity_ratio<=2]
"""
    found = recipe(tmp_path, text)
    names = [step.name for step in found.steps]
    assert names.count("prune") == 1
    assert len(names) == 1 + 4 + 4
    step = found.step("quantize-bits-3-group-32")
    assert step.method == GPTQ(bits=3, group_size=32)
    assert found.step("evaluate-bits-3-group-32").sources == ("${quantize-bits-3-group-32}",)
    assert found.judged == [name for name in names if name.startswith("evaluate")]


def test_a_matrix_over_folders_takes_what_the_pattern_matches(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "zoo" / name).mkdir(parents=True)
    text = f"source: m\nmatrix: {{model: '{tmp_path}/zoo/*'}}\nsteps: [{{prune: cfsp, source: '${{model}}'}}]"
    found = recipe(tmp_path, text)
    assert [step.name for step in found.steps] == ["prune-model-a", "prune-model-b"]
    assert found.steps[0].sources == (str(tmp_path / "zoo" / "a"),)


SECRET = "hunter2: the key"


@pytest.mark.parametrize("name", ["secret", "secret.txt", "linked.yaml", "folder.yaml", "pipe.yaml", "/etc/hostname"])
def test_nothing_but_a_yaml_file_is_included(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "linked.yaml").symlink_to("secret")
    (tmp_path / "folder.yaml").mkdir()
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1: include: .*no \.yaml file; give a recipe$"):
        recipe(tmp_path, f"include: {name}\nsource: m\nsteps: []")


@pytest.mark.parametrize("text", [SECRET, "hunter2", "- hunter2", "hunter2: [", "a: !!python/name:hunter2", "", "\xff"])
def test_an_included_file_that_is_no_recipe_is_named_and_not_quoted(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, "include: other.yaml\nsource: m\nsteps: [{prune: cfsp}]")
    assert "hunter2" not in str(caught.value)
    assert f"include: {tmp_path / 'other.yaml'} is no recipe; compresskit plan " in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_linked_recipe_is_included_and_a_mistake_in_it_is_placed(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "base.yml").write_text("steps: [{prune: cfsp}]\nstep: []")
    (tmp_path / "base.yaml").symlink_to(tmp_path / "inner" / "base.yml")
    with pytest.raises(RecipeError, match=r"base\.yaml:2: recipe: unknown key 'step'; Did you mean 'steps'"):
        recipe(tmp_path, "include: base.yaml\nsource: m")


def test_an_included_recipe_comes_first_and_own_keys_win(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("source: m\ndefaults: {samples: 4, seed: 3}\nsteps: [{prune: cfsp}]")
    found = recipe(tmp_path, "include: base.yaml\nsource: n\ndefaults: {samples: 5}\nsteps: [{quantize: gptq}]")
    assert [step.name for step in found.steps] == ["prune", "quantize"]
    options = found.steps[0].options.model_dump()
    assert (found.source, options["samples"], options["seed"]) == ("n", 5, 3)


def test_the_command_line_replaces_source_and_variables(tmp_path: Path) -> None:
    text = "source: m\nvariables: {text: self}\nsteps: [{prune: cfsp, calibration: '${text}+builtin'}]"
    found = recipe(tmp_path, text, source="other", text="file.txt")
    assert found.steps[0].sources == ("other",)
    assert found.steps[0].options.model_dump()["calibration"] == "file.txt+builtin"


@pytest.mark.parametrize("spelling", ["5e-4", "5.0e-4", "0.0005"])
def test_numbers_are_read_as_people_write_them(spelling: str, tmp_path: Path) -> None:
    found = recipe(tmp_path, f"source: m\nsteps: [{{quantize: apiq, learning_rate: {spelling}}}]")
    assert found.steps[0].method.model_dump()["learning_rate"] == 5e-4  # type: ignore[union-attr]


def test_reading_a_recipe_loads_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("source: m\nsteps: [{prune: cfsp}, {quantize: apiq}, {evaluate: }]")
    script = (
        "import sys; from pathlib import Path; from compresskit.recipe.reading import load; "
        f"load(Path({str(path)!r})); print('torch' in sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"


@pytest.mark.parametrize(
    "text",
    [
        'steps: [{quantize: rtn, calibration: "${HOME}/a.txt"}]', 'steps: [{quantize: rtn, source: "${HOME}/m"}]',
        'steps: [{evaluate: , against: "${HOME}/m"}]', 'defaults: {calibration: "${HOME}/a"}\nsteps: [{quantize: rtn}]',
        'variables: {a: "${HOME}/a"}\nsteps: [{quantize: rtn, calibration: "${a}"}]',
        'matrix: {a: ["${HOME}/a", b]}\nsteps: [{quantize: rtn, calibration: "${a}"}]',
    ],
)  # fmt: skip
def test_variables_of_the_environment_are_none_of_a_recipe(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nothing is named 'HOME' before this step") as caught:
        recipe(tmp_path, f"source: m\n{text}")
    assert len(str(caught.value).splitlines()) == 1
