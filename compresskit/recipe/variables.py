"""Put the values of variables in the place of `${NAME}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from compresskit.checkpoint.small_files import shown
from compresskit.recipe.located import Value
from compresskit.recipe.steps import REFERENCE

LONGEST_TEXT = 100_000
"""Characters of a value with its variables."""


def texts_of(value: Value) -> Iterator[str]:
    """All texts in a value."""
    if isinstance(value.content, dict):
        for each in value.content.values():
            yield from texts_of(each)
    elif isinstance(value.content, list):
        for each in value.content:
            yield from texts_of(each)
    elif isinstance(value.content, str):
        yield value.content


def substituted(value: Value, scope: Mapping[str, Value]) -> Value:
    """Substitute variables; a text that is a single variable becomes the variable's value, of any type.

    Returns:
        The value; names that are no variables stay.

    Raises:
        RecipeError: a text becomes too long.
    """
    if isinstance(value.content, dict):
        return Value({key: substituted(each, scope) for key, each in value.content.items()}, value.place, value.keys)
    if isinstance(value.content, list):
        return Value([substituted(each, scope) for each in value.content], value.place, {})
    if not isinstance(value.content, str):
        return value
    alone = REFERENCE.fullmatch(value.content)
    if alone and alone[1] in scope:
        return Value(scope[alone[1]].content, value.place, {})
    names = [name for name in REFERENCE.findall(value.content) if name in scope]
    texts = {name: str(scope[name].plain()) for name in names}
    if sum(len(texts[name]) for name in names) > LONGEST_TEXT:
        raise value.place.error(f"{shown(value.content)}: longer than {LONGEST_TEXT} characters with its variables; shorten it")
    return Value(REFERENCE.sub(lambda found: texts.get(found[1], found[0]), value.content), value.place, {})
