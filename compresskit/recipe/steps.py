"""One step of a recipe: a stage, its method, and typed settings of the same classes as the command line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError

from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import RequestError, near_miss
from compresskit.evaluation.gates import parse_gate
from compresskit.methods import METHODS, STAGES, entry, method_class, options_class, stage_of
from compresskit.recipe.located import Place, Value

OWN_KEYS = ("name", "stage", "method", "source")
MODEL_FIELDS = ("source", "original", "against", "adapter", "base")
"""Settings that take a model, where a bare step name means that step's output."""
RUN_DECIDES = ("overwrite", "resume")
"""Settings that belong to the run, not to the recipe."""
REFERENCE = re.compile(r"\$\{([^${}]*)\}")
LONGEST_HINT = 100
"""Characters that are compared with known names."""
STEP_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=-]*")
LONGEST_NAME = 150
"""Characters of a step's name, which is a folder's."""


@dataclass(frozen=True)
class Step:
    """One typed step; texts may contain `${name of an earlier step}`, which the run replaces with that step's folder."""

    name: str
    stage: str
    method_name: str | None
    sources: tuple[str, ...]
    """One source, or several for stages that merge."""
    method: BaseModel | None
    """The method's settings; None for stages without methods."""
    options: BaseModel
    place: Place

    @property
    def title(self) -> str:
        """`prune cfsp`."""
        return f"{self.stage} {self.method_name}" if self.method_name else self.stage

    @property
    def writes_model(self) -> bool:
        """Whether a later step can use its output."""
        return stage_of(self.stage, self.method_name or "").gives not in ("report", "file")

    @property
    def file(self) -> str:
        """Name of the one file that it writes into its folder; "" for steps that write none."""
        exports = stage_of(self.stage, self.method_name or "").gives == "file"
        return f"{self.name}{getattr(self.method or self.options, 'ending', '')}" if exports else ""

    @property
    def references(self) -> list[str]:
        """Names of the steps whose outputs it reads, in order of mention."""
        texts = [*self.sources, *texts_in(self.options), *(texts_in(self.method) if self.method else ())]
        return list(dict.fromkeys(name for text in texts for name in REFERENCE.findall(text)))


def texts_in(settings: BaseModel) -> Iterable[str]:
    """All texts among the values of a settings object."""
    for value in settings.model_dump().values():
        yield from (each for each in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(each, str))


def resolved(settings: BaseModel, replace: Callable[[str], str]) -> Any:
    """Copy the settings with every text passed through `replace`."""
    changed: dict[str, Any] = {}
    for name, value in settings.model_dump().items():
        if isinstance(value, str):
            changed[name] = replace(value)
        elif isinstance(value, (tuple, list)):
            changed[name] = tuple(replace(each) if isinstance(each, str) else each for each in value)
    return settings.model_copy(update=changed)


@dataclass(frozen=True)
class Context:
    """Names to which a step may refer."""

    earlier: Mapping[str, Step]
    """Earlier steps, by their names in the recipe."""
    later: tuple[str, ...]
    """Names of this step and later ones."""
    source: str
    """The recipe's source."""
    defaults: Mapping[str, Value]
    """Settings applied to every step that has them."""


def kind_of(step: Value) -> tuple[str, str | None]:
    """Return (stage, method) of a step, from `stage:` and `method:` or from `prune: cfsp`; raises RecipeError if missing."""
    given = step.mapping("step")
    # `merge: true` is a setting of compensate, `merge: ties` is a stage
    short = [key for key in given if key in STAGES and (given[key].content is None or isinstance(given[key].content, str))]
    if "stage" in given:
        if short:
            raise step.keys[short[0]].error(f"the step says both stage and {short[0]}; keep one of them")
        stage = given["stage"].text("stage")
        if stage not in STAGES:
            raise given["stage"].place.error(
                f"stage: no stage {shown(stage)};{near_miss(stage[:LONGEST_HINT], STAGES)} There are {_stages()}"
            )
        return stage, _method_name(step, stage, given.get("method"), "method")
    if len(short) > 1:
        raise step.keys[short[1]].error(f"the step names two stages, {short[0]} and {short[1]}; make two steps of them")
    if not short:
        unknown = next((key for key in given if near_miss(key, STAGES)), None)
        place = step.keys[unknown] if unknown else step.place
        hint = f"unknown key {unknown!r};{near_miss(unknown, STAGES)} " if unknown else ""
        raise place.error(f"{hint}the step names no stage; start it with one of {_stages()}, as in `prune: cfsp`")
    if "method" in given:
        raise step.keys["method"].error(f"the step names its method twice; keep `{short[0]}: METHOD`")
    return short[0], _method_name(step, short[0], given[short[0]], short[0])


def _stages() -> str:
    return ", ".join(name for name in STAGES if " " not in name)


def _method_name(step: Value, stage: str, given: Value | None, key: str) -> str | None:
    if stage not in METHODS:
        if given is not None and given.content is not None and key != "method":
            raise given.place.error(f"{key}: has no methods; write `{key}:` alone, and its settings below")
        if given is not None and key == "method":
            raise given.place.error(f"method: {stage} has no methods; leave it out")
        return None
    if given is None or given.content is None:
        place = given.place if given else step.place
        raise place.error(f"{stage}: which method? There are {', '.join(METHODS[stage])}")
    name = given.text(key)
    try:
        entry(stage, name)
    except RequestError as error:
        raise given.place.error(str(error)) from error
    return name


def build(value: Value, name: str, context: Context) -> Step:
    """Build the typed step; raises RecipeError at the first invalid key or value."""
    given = value.mapping("step")
    stage, method_name = kind_of(value)
    method_type = method_class(stage, method_name) if method_name else None
    options_type = options_class(stage, method_name or "")
    types = [each for each in (method_type, options_type) if each is not None]
    known = [field for each in types for field in each.model_fields if field not in RUN_DECIDES]
    for field in RUN_DECIDES:
        if field in given:
            raise value.keys[field].error(f"{field}: the run decides this, not the recipe; leave it out")
    title = f"{stage} {method_name or ''}".strip()
    value.check_keys(title, (*OWN_KEYS, stage, *known))
    settings = {key: each for key, each in context.defaults.items() if key in known}
    settings |= {key: each for key, each in given.items() if key in known}
    built = [_typed(each, settings, value.place, title, context) for each in types]
    step = Step(
        name, stage, method_name, _sources(given.get("source"), value, context),
        built[0] if method_type else None, built[-1], value.place,
    )  # fmt: skip
    _check_order(step, context)
    for gate in getattr(step.options, "gate", ()):
        _check_gate(gate, settings["gate"].place)
    return step


def _check_gate(gate: str, place: Place) -> None:
    try:
        parse_gate(gate)
    except RequestError as error:
        raise place.error(str(error)) from error


def _typed(model: type[BaseModel], settings: Mapping[str, Value], place: Place, title: str, context: Context) -> BaseModel:
    hints = get_type_hints(model)
    values = {}
    for name in model.model_fields:
        if name in settings:
            plain = settings[name].plain()
            several = get_origin(hints[name]) is tuple
            plain = [plain] if several and not isinstance(plain, list) else plain
            values[name] = _with_references(plain, name, settings[name].place, context)
    try:
        return model(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(next(iter(fault["loc"]), ""))
        if fault["type"] == "missing":
            raise place.error(f"{title}: needs {name}: {_described(model, name)}") from error
        if name not in values:
            raise place.error(f"{title}: {first_line(error)}") from error
        found = values[name]
        choices = [each for each in get_args(hints[name]) if isinstance(each, str)]
        hint = near_miss(found[:LONGEST_HINT], choices) if isinstance(found, str) else ""
        message = " ".join(fault["msg"].split())
        raise settings[name].place.error(f"{title}: {name} {shown(found)}: {message[:1].lower()}{message[1:]}.{hint}") from error
    except RequestError as error:
        raise place.error(f"{title}: {error}") from error


def _described(model: type[BaseModel], name: str) -> str:
    return model.model_fields[name].description or "it has no default"


def _with_references(plain: Any, field: str, place: Place, context: Context) -> Any:
    """Check all references, and convert bare step names in model settings to `${name}`."""
    if isinstance(plain, list):
        return [_with_references(each, field, place, context) for each in plain]
    if not isinstance(plain, str):
        return plain
    if field in MODEL_FIELDS and (plain in context.earlier or plain in context.later or plain == "source"):
        plain = "${" + plain + "}"
    return REFERENCE.sub(lambda found: _reference(found[1], field, place, context), plain)


def _reference(name: str, field: str, place: Place, context: Context) -> str:
    if name == "source":
        return context.source
    if name in context.later:
        what = "itself" if name == context.later[0] else f"the later step {name!r}"
        raise place.error(f"{field}: refers to {what}; a step can only take what an earlier one has written")
    if name not in context.earlier:
        known = ["source", *context.earlier]
        raise place.error(
            f"{field}: nothing is named {shown(name)} before this step;{near_miss(name[:LONGEST_HINT], known)} "
            f"Known are {', '.join(known)}"
        )
    step = context.earlier[name]
    if not step.writes_model and field in MODEL_FIELDS:
        raise place.error(f"{field}: step {name!r} ({step.title}) writes no model that a step reads; name the one before it")
    return "${" + step.name + "}"


def _sources(given: Value | None, step: Value, context: Context) -> tuple[str, ...]:
    if given is None:
        models = [each for each in context.earlier.values() if each.writes_model]
        return ("${" + models[-1].name + "}",) if models else (context.source,)
    items = given.list("source") if isinstance(given.content, list) else [given]
    if not items:
        raise given.place.error("source: the list is empty; name at least one")
    return tuple(_with_references(each.text("source"), "source", each.place, context) for each in items)


def _check_order(step: Step, context: Context) -> None:
    """Raise RecipeError if the stage cannot take the named step's output."""
    takes = stage_of(step.stage, step.method_name or "").takes
    by_name = {each.name: each for each in context.earlier.values()}
    for name in REFERENCE.findall(step.sources[0]):
        giver = by_name[name]
        gives = stage_of(giver.stage, giver.method_name or "").gives
        if takes == "dense" and gives == "low-bit":
            raise step.place.error(
                f"{step.title}: cannot take what {giver.title} gives, a low-bit model; put {step.stage} before {giver.stage}, "
                "or name a source"
            )
