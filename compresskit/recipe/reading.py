"""Read a recipe file into typed steps: include, variables, defaults, matrix.

source: demo:smollm2-135m          input of the first step; `${source}`
variables: {text: self}            `${text}`; `--set text=FILE` replaces it
defaults: {samples: 64}            settings of every step that has them
matrix: {bits: [2, 3]}             a copy of every step that depends on `${bits}`, for each value
steps: [{prune: cfsp, sparsity: 0.2}, {quantize: gptq, bits: "${bits}"}, {evaluate:, against: "${source}"}]
gates: ["perplexity_ratio<=1.2"]   checked against the last evaluation
include: FILE                      another recipe, whose steps come first; keys here take precedence
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import shown
from compresskit.errors import RequestError, near_miss
from compresskit.evaluation.gates import parse_gate
from compresskit.recipe.located import Place, RecipeError, Value, read
from compresskit.recipe.steps import LONGEST_NAME, REFERENCE, RUN_DECIDES, STEP_NAME, Context, Step, build, kind_of
from compresskit.recipe.variables import substituted, texts_of

KEYS = ("description", "source", "variables", "defaults", "matrix", "steps", "gates", "include")
MOST_STEPS = 500
"""A larger grid is a mistake, or should be several recipes."""
RECIPE_SUFFIXES = {".yaml", ".yml"}
MOST_CELLS = 20_000
"""Cells of a matrix times steps; each takes some 0.1 ms."""
MOST_MATCHES = 1000
"""Of a pattern in a matrix."""
RESERVED = ("source", "here")
"""Reserved names; `${here}` is the folder of the recipe."""


@dataclass(frozen=True)
class Recipe:
    """A checked recipe."""

    path: Path
    description: str
    source: str
    steps: list[Step]
    gates: list[str]
    """Limits for the last evaluation (of every matrix cell)."""
    judged: list[str]
    """Names of the evaluate steps that these gates check."""
    matrix: dict[str, list[Any]]

    def step(self, name: str) -> Step:
        """Return the step of this name; raises RequestError with the nearest name if there is none."""
        names = [step.name for step in self.steps]
        if name not in names:
            raise RequestError(f"{self.path}: no step {name!r};{near_miss(name, names)} There are {', '.join(names)}")
        return self.steps[names.index(name)]


def load(path: Path, given: Mapping[str, str] | None = None) -> Recipe:
    """Read and check a recipe before any work; `given` replaces variables and `source`.

    Returns:
        The recipe with all steps of its matrix, as typed settings.

    Raises:
        RecipeError: the recipe is invalid; the message names file, line and key.
        RequestError: `given` names an unknown variable.
    """
    document = _included(path, ())
    document.check_keys("recipe", KEYS)
    content = document.mapping("recipe")
    values = _variables(content, dict(given or {}), path)
    if "source" not in values:
        raise document.place.error("the recipe has no source; add `source: FOLDER`, a Hub id or demo:smollm2-135m")
    steps = content["steps"].list("steps") if "steps" in content else []
    if not steps:
        raise document.place.error("the recipe has no steps; add `steps:` with at least one")
    matrix = _matrix(content.get("matrix"), values)
    defaults = content["defaults"].mapping("defaults") if "defaults" in content else {}
    built, last = _build_all(steps, values, matrix, defaults)
    _check_defaults(content.get("defaults"), built)
    gates = [_gate(each) for each in content["gates"].list("gates")] if "gates" in content else []
    if gates and not last:
        raise document.keys["gates"].error("gates: no step evaluates; add `- evaluate:` with `against: ${source}` at the end")
    description = content["description"].text("description") if "description" in content else ""
    return Recipe(path, description.strip(), str(values["source"].plain()), built, gates, last, _plain_matrix(matrix))


def _included(path: Path, above: tuple[Path, ...]) -> Value:
    """Merge the document with its included one: own keys take precedence, included steps come first."""
    document = read(path)
    content = document.mapping("recipe")
    if "include" not in content:
        return document
    name = content["include"].text("include")
    other = path.parent / name
    place = content["include"].place
    if other.resolve() in (path.resolve(), *above):
        raise place.error(f"include: {name} includes this file again; a chain of includes must end")
    _check_included(other, place)
    base = _included(other, (*above, path.resolve()))
    merged = {**base.mapping("recipe"), **content}
    for key in ("variables", "defaults"):
        if key in content and key in base.content:
            both = {**base.content[key].mapping(key), **content[key].mapping(key)}
            keys = {**base.content[key].keys, **content[key].keys}
            merged[key] = Value(both, content[key].place, keys)
    if "steps" in content and "steps" in base.content:
        merged["steps"] = Value(base.content["steps"].list("steps") + content["steps"].list("steps"), content["steps"].place, {})
    del merged["include"]
    return Value(merged, document.place, {**base.keys, **document.keys})


def _check_included(path: Path, place: Place) -> None:
    """Refuse to include anything but a recipe, without saying what is in it."""
    if not path.exists():
        raise place.error(f"include: {path} does not exist; the path is relative to this file")
    if not path.is_file() or {path.suffix, path.resolve().suffix} - RECIPE_SUFFIXES:
        raise place.error(f"include: {path} is no .yaml file; give a recipe")
    try:
        known = set(read(path).mapping("recipe")) & set(KEYS)
    except RecipeError:
        known = set()
    if not known:
        reason = f"is no recipe; compresskit plan {path} says what is wrong with it"
        raise place.error(f"include: {path} {reason}") from None


def _variables(content: Mapping[str, Value], given: dict[str, str], path: Path) -> dict[str, Value]:
    values: dict[str, Value] = {"here": Value(str(path.parent), Place(str(path), 1), {})}
    if "variables" in content:
        for name, value in content["variables"].mapping("variables").items():
            if name in RESERVED:
                raise content["variables"].keys[name].error(f"variables: {name} has a meaning of its own; choose another name")
            values[name] = value
    if "source" in content:
        values["source"] = content["source"]
    for name, text in given.items():
        if name not in values and name != "source":
            raise RequestError(f"--set {name}: {path} has no such variable;{near_miss(name, values)} It has {', '.join(values)}")
        values[name] = Value(text, Place("--set", 1), {})
    for name, value in values.items():
        if value.content is None:
            raise value.place.error(f"{name}: has no value; write one, or pass --set {name}=VALUE")
    if "source" in values and REFERENCE.search(values["source"].text("source")):
        raise values["source"].place.error(f"source {shown(values['source'].content)}: takes no ${{...}}; write the path")
    return values


def _matrix(given: Value | None, values: Mapping[str, Value]) -> dict[str, list[Value]]:
    if given is None:
        return {}
    found: dict[str, list[Value]] = {}
    for name, value in given.mapping("matrix").items():
        if name in values:
            raise given.keys[name].error(f"matrix: {name} is a variable already; give one of them another name")
        filled = substituted(value, values)
        options = _matching_folders(filled) if isinstance(filled.content, str) else filled.list(f"matrix: {name}")
        if not options:
            raise filled.place.error(f"matrix: {name} has no values; give at least one")
        found[name] = options
    return found


def _matching_folders(value: Value) -> list[Value]:
    pattern = Path(value.text("matrix"))
    folder = pattern.parent
    wide = "**" in pattern.name or not pattern.name  # the one reads a whole disk, the other is none
    try:
        found = sorted(itertools.islice(folder.glob(pattern.name), MOST_MATCHES)) if folder.is_dir() and not wide else []
    except (OSError, ValueError):  # a name that is too long, or no pattern
        found = []
    if not found:
        raise value.place.error(f"matrix: nothing matches {shown(str(pattern))}; give a list, or a pattern such as adapters/*")
    return [Value(str(path), value.place, {}) for path in found if path.is_dir()]


def _plain_matrix(matrix: Mapping[str, list[Value]]) -> dict[str, list[Any]]:
    return {name: [value.plain() for value in values] for name, values in matrix.items()}


def _build_all(
    steps: Sequence[Value], values: Mapping[str, Value], matrix: Mapping[str, list[Value]], defaults: Mapping[str, Value]
) -> tuple[list[Step], list[str]]:
    """Return (every step of every matrix cell, each once; names of the last evaluate steps)."""
    names = _names(steps)
    common = [text for each in defaults.values() for text in texts_of(each)]
    depends = _dependencies(steps, names, matrix, common)
    unused = [name for name in matrix if not any(name in each for each in depends)]
    if unused:
        raise matrix[unused[0]][0].place.error(f"matrix: no step uses ${{{unused[0]}}}; use it in a setting, or remove it")
    built: dict[str, Step] = {}
    judged: list[str] = []
    if math.prod(map(len, matrix.values())) * len(steps) > MOST_CELLS:
        raise steps[0].place.error(f"matrix: more than {MOST_CELLS} combinations and steps; give fewer values")
    last = max((index for index, step in enumerate(steps) if kind_of(step)[0] == "evaluate"), default=None)
    for cell in _cells(matrix):
        earlier: dict[str, Step] = {}
        for index, value in enumerate(steps):
            full = names[index] + "".join(f"-{key}-{_slug(cell[key].plain())}" for key in matrix if key in depends[index])
            scope = {**values, **cell}
            context = Context(
                dict(earlier), tuple(names[index:]), str(values["source"].plain()),
                {key: substituted(each, scope) for key, each in defaults.items()},
            )  # fmt: skip
            if len(full) > LONGEST_NAME:
                raise value.place.error(
                    f"name {shown(full)}: it becomes a folder, of at most {LONGEST_NAME} characters; shorten it"
                )
            if full not in built:
                built[full] = build(substituted(value, scope), full, context)
            earlier[names[index]] = built[full]
            if index == last:
                judged.append(full)
        if len(built) > MOST_STEPS:
            raise steps[0].place.error(f"matrix: more than {MOST_STEPS} steps; give fewer values")
    return list(built.values()), list(dict.fromkeys(judged))


def _cells(matrix: Mapping[str, list[Value]]) -> Iterator[dict[str, Value]]:
    for combination in itertools.product(*matrix.values()):
        yield dict(zip(matrix, combination, strict=True))


def _slug(value: Any) -> str:
    """Convert the value to a part of a folder name."""
    text = str(value).rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^A-Za-z0-9._]+", "_", text) or "empty"


def _names(steps: Sequence[Value]) -> list[str]:
    """Name of every step: its own, or its stage with a number from the second on."""
    names: dict[str, Value] = {}
    for step in steps:
        stage, _ = kind_of(step)
        if "name" in step.content:
            value = step.content["name"]
            name = value.text("name")
            if not STEP_NAME.fullmatch(name):
                raise value.place.error(f"name {name!r}: it becomes a folder; use letters, digits, dots and dashes")
            if name in names or name in RESERVED:
                first = f"the step in line {names[name].place.line}" if name in names else "the recipe's source"
                raise value.place.error(f"name: {name!r} is the name of {first}; choose another")
        else:
            name = next(n for n in itertools.chain((stage,), (f"{stage}-{i}" for i in itertools.count(2))) if n not in names)
        names[name] = step
    return list(names)


def _dependencies(
    steps: Sequence[Value], names: Sequence[str], matrix: Mapping[str, Any], common: Sequence[str]
) -> list[set[str]]:
    """Matrix variables on which each step depends, directly or through its inputs; `common`: texts of defaults."""
    by_name: dict[str, set[str]] = {}
    before: set[str] = set()
    for name, step in zip(names, steps, strict=True):
        texts = [*texts_of(step), *common]
        mentioned = {found for text in texts for found in REFERENCE.findall(text)} | set(texts)
        own = {each for each in matrix if any("${" + each + "}" in text for text in texts)}
        for other, variables in by_name.items():
            own |= variables if other in mentioned else set()
        if "source" not in step.content:
            own |= before
        by_name[name] = own
        if kind_of(step)[0] != "evaluate":
            before = own
    return list(by_name.values())


def _check_defaults(defaults: Value | None, steps: Sequence[Step]) -> None:
    if defaults is None:
        return
    known = {name for step in steps for name in type(step.options).model_fields}
    known |= {name for step in steps if step.method for name in type(step.method).model_fields}
    for key, place in defaults.keys.items():
        if key not in known - set(RUN_DECIDES):
            raise place.error(f"defaults: no step knows {key!r};{near_miss(key, known)} Remove it, or put it into its step")


def _gate(value: Value) -> str:
    text = value.text("gates")
    try:
        return str(parse_gate(text))
    except RequestError as error:
        raise value.place.error(str(error)) from error
