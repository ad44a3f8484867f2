"""recipe/located.py, recipe/reading.py: every mistake is refused with file, line, key and remedy, at once. End to end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from compresskit.errors import RequestError
from compresskit.recipe.located import RecipeError
from compresskit.recipe.reading import load

HEAD = "source: model\nsteps:\n"
MISTAKES: dict[str, tuple[str, int, str]] = {
    "a typo in a recipe key": ("source: model\nstep:\n  - prune: cfsp\n", 2, "'step'; Did you mean 'steps'?"),
    "no source": ("steps:\n  - prune: cfsp\n", 1, "has no source"),
    "no steps": ("source: model\n", 1, "has no steps"),
    "steps that are no list": ("source: model\nsteps:\n  prune: cfsp\n", 3, "expected a list"),
    "an empty file": ("", 1, "is empty"),
    "a document that is a list": ("- prune: cfsp\n", 1, "expected keys and values"),
    "broken YAML": (HEAD + "  - prune: [cfsp\n    sparsity: 0.2\n", 4, "not valid YAML"),
    "a key twice": (HEAD + "  - prune: cfsp\n    sparsity: 0.2\n    sparsity: 0.3\n", 5, "stands twice, first in line 4"),
    "a typo in a setting": (HEAD + "  - prune: cfsp\n    sparsty: 0.2\n", 4, "'sparsty'; Did you mean 'sparsity'?"),
    "a setting of another method": (HEAD + "  - quantize: rtn\n    damping: 0.1\n", 4, "unknown key 'damping'"),
    "an unknown method": (HEAD + "  - prune: cfps\n", 3, "Did you mean 'cfsp'?"),
    "an unknown stage": (HEAD + "  - quantise: gptq\n", 3, "Did you mean 'quantize'?"),
    "no stage": (HEAD + "  - sparsity: 0.2\n", 3, "names no stage"),
    "two stages in one step": (HEAD + "  - prune: cfsp\n    quantize: gptq\n", 4, "two stages"),
    "no method": (HEAD + "  - prune:\n    sparsity: 0.2\n", 3, "which method? There are cfsp"),
    "a method for evaluate": (HEAD + "  - evaluate: perplexity\n", 3, "has no methods"),
    "a wrong type": (HEAD + "  - quantize: gptq\n    bits: four\n", 4, "bits 'four'"),
    "a value out of range": (HEAD + "  - prune: cfsp\n    sparsity: 1.5\n", 4, "sparsity 1.5: input should be less than 1"),
    "a wrong choice": (HEAD + "  - prune: cfsp\n    allocation: unifrom\n", 4, "Did you mean 'uniform'?"),
    "a missing setting": (HEAD + "  - quantize: rtn\n  - compensate: eora\n", 4, "needs original"),
    "a step that takes a later one": (
        HEAD + "  - prune: cfsp\n    source: b\n  - name: b\n    prune: flap\n", 4, "refers to the later step 'b'",
    ),
    "a step that takes itself": (HEAD + "  - name: a\n    prune: cfsp\n    source: ${a}\n", 5, "refers to itself"),
    "an unknown reference": (HEAD + "  - name: small\n    prune: cfsp\n  - quantize: rtn\n    source: ${smal}\n", 6, "'small'?"),
    "a report as a source": (HEAD + "  - evaluate:\n  - prune: cfsp\n    source: evaluate\n", 5, "writes no model"),
    "duplicate names": (HEAD + "  - name: a\n    prune: cfsp\n  - name: a\n    quantize: rtn\n", 5, "the step in line 3"),
    "a name that is no folder": (HEAD + "  - name: ../a\n    prune: cfsp\n", 3, "becomes a folder"),
    "pruning a low-bit model": (HEAD + "  - quantize: rtn\n  - prune: cfsp\n", 4, "put prune before quantize"),
    "quantizing twice": (HEAD + "  - quantize: rtn\n  - quantize: gptq\n", 4, "a low-bit model"),
    "a matrix that nothing uses": ("source: m\nmatrix:\n  bits: [2, 3]\nsteps:\n  - quantize: rtn\n", 3, "no step uses ${bits}"),
    "an empty matrix": ("source: m\nmatrix:\n  bits: []\nsteps:\n  - quantize: rtn\n    bits: ${bits}\n", 3, "no values"),
    "a pattern that nothing matches": ("source: m\nmatrix:\n  a: no/*\nsteps:\n  - prune: cfsp\n    source: ${a}\n", 3, "no/*"),
    "a file to include that is missing": ("include: base.yaml\n", 1, "does not exist"),
    "a file that includes itself": ("include: recipe.yaml\n", 1, "includes this file again"),
    "a default that no step knows": ("source: m\ndefaults:\n  sampels: 8\nsteps:\n  - prune: cfsp\n", 3, "'samples'?"),
    "a bad gate": (HEAD + "  - evaluate:\ngates:\n  - perplexity_ratoi<=1.2\n", 5, "Did you mean 'perplexity_ratio'?"),
    "a bad gate in a step": (HEAD + "  - evaluate:\n    gate: perplexity=1\n", 4, "unknown operator '='"),
    "gates without an evaluation": (HEAD + "  - prune: cfsp\ngates:\n  - bytes<=1\n", 4, "no step evaluates"),
    "a setting of the run": (HEAD + "  - prune: cfsp\n    overwrite: true\n", 4, "the run decides"),
    "a variable without a value": ("source: m\nvariables:\n  data:\nsteps:\n  - prune: cfsp\n", 3, "--set data=VALUE"),
    "an alias of itself": ("source: m\nsteps: &all\n  - *all\n", 2, "contains itself"),
    "a key that is a number": (HEAD + "  - prune: cfsp\n    2: 3\n", 4, "keys are text"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_refused_by_file_line_and_remedy(mistake: str, tmp_path: Path) -> None:
    text, line, words = MISTAKES[mistake]
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    started = time.process_time()
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert time.process_time() - started < 1
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: "), said
    assert words in said
    assert "\n" not in said
    assert caught.value.exit_code == 2


def test_a_billion_laughs_are_not_unfolded(tmp_path: Path) -> None:
    levels = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"l0: &l0 [a, a]\n{levels}\n")
    started = time.process_time()
    with pytest.raises(RecipeError, match="aliases"):
        load(path)
    assert time.process_time() - started < 1


def test_a_missing_file_a_folder_and_bytes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read"):
        load(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RecipeError, match="is not UTF-8"):
        load(tmp_path / "bytes")


def test_a_variable_that_the_recipe_lacks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("source: m\nvariables: {text: self}\nsteps:\n  - prune: cfsp\n    calibration: ${text}\n")
    with pytest.raises(RequestError, match=r"--set txt: .* Did you mean 'text'"):
        load(path, {"txt": "builtin"})
    assert load(path, {"text": "builtin"}).steps[0].options.model_dump()["calibration"] == "builtin"
