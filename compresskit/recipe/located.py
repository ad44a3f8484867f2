"""YAML values with their file and line, so that errors show the position."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compresskit.errors import RequestError, near_miss

LARGEST_FILE_BYTES = 1 << 20
"""A recipe is written by hand; a file above 1 MiB is something else."""
MOST_NODES = 5_000
"""Aliases of aliases can expand to billions of values."""


class RecipeError(RequestError):
    """The recipe is invalid; the message names file, line and key, the value found and the expected one."""


@dataclass(frozen=True)
class Place:
    """Position in a file."""

    file: str
    line: int
    """Line number, from 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"

    def error(self, message: str) -> RecipeError:
        """Build an error for this position."""
        return RecipeError(f"{self}: {message}")


@dataclass(frozen=True)
class Value:
    """One YAML value: `content` is a scalar, a list of values, or a dictionary of values by key."""

    content: Any
    place: Place
    keys: dict[str, Place]
    """Positions of a dictionary's keys."""

    def mapping(self, what: str) -> dict[str, Value]:
        """The content as a dictionary; raises RecipeError if it is not one."""
        if not isinstance(self.content, dict):
            raise self.place.error(f"{what}: expected keys and values, found {self.kind}")
        return self.content

    def list(self, what: str) -> list[Value]:
        """The content as a list; raises RecipeError if it is not one."""
        if not isinstance(self.content, list):
            raise self.place.error(f"{what}: expected a list, found {self.kind}; put a dash before each item")
        return self.content

    def text(self, what: str) -> str:
        """The content as text; raises RecipeError if it is not text or is empty."""
        if not isinstance(self.content, str) or not self.content.strip():
            raise self.place.error(f"{what}: expected text, found {self.kind}")
        return self.content

    @property
    def kind(self) -> str:
        """Kind of value, in words."""
        if isinstance(self.content, dict):
            return "keys and values"
        if isinstance(self.content, list):
            return "a list"
        return "nothing" if self.content in (None, "") else repr(self.content)

    def plain(self) -> Any:
        """The content without positions."""
        if isinstance(self.content, dict):
            return {key: value.plain() for key, value in self.content.items()}
        if isinstance(self.content, list):
            return [value.plain() for value in self.content]
        return self.content

    def check_keys(self, what: str, known: Iterable[str]) -> None:
        """Raise RecipeError at the first unknown key, with the nearest known one."""
        known = list(known)
        for key, place in self.keys.items():
            if key not in known:
                raise place.error(f"{what}: unknown key {key!r};{near_miss(key, known)} Known are {', '.join(known)}")


def read(path: Path) -> Value:
    """Read a file's document; raises RecipeError if it is unreadable or not YAML."""
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise Place(str(path), 1).error(f"{path.stat().st_size} bytes are no recipe; give the YAML file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); check the path, or see compresskit run --list") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    return parse(text, str(path))


def parse(text: str, name: str) -> Value:
    """Parse a text; raises RecipeError if it is not YAML. `name` is the file name in errors."""
    loader = yaml.SafeLoader(text)
    loader.name = name
    try:
        node = loader.get_single_node()
        if node is None:
            raise Place(name, 1).error("is empty; a recipe has at least source and steps")
        return _Converter(loader, name).value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise Place(name, mark.line + 1 if mark else 1).error(f"not valid YAML: {problem}") from error
    except yaml.YAMLError as error:
        raise Place(name, 1).error(f"not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        loader.dispose()


class _Converter:
    """Converts nodes to values, counts them and resolves aliases."""

    def __init__(self, loader: yaml.SafeLoader, name: str):
        self.loader = loader
        self.name = name
        self.count = 0
        self.above: set[int] = set()

    def place(self, node: yaml.Node) -> Place:
        return Place(self.name, node.start_mark.line + 1)

    def value(self, node: yaml.Node) -> Value:
        place = self.place(node)
        self.count += 1
        if self.count > MOST_NODES:
            raise place.error(f"more than {MOST_NODES} values; aliases that repeat aliases are not unfolded")
        if id(node) in self.above:
            raise place.error("an alias that contains itself; write the values out")
        self.above.add(id(node))
        try:
            return self._converted(node, place)
        finally:
            self.above.discard(id(node))

    def _converted(self, node: yaml.Node, place: Place) -> Value:
        if isinstance(node, yaml.SequenceNode):
            return Value([self.value(item) for item in node.value], place, {})
        if isinstance(node, yaml.MappingNode):
            self.loader.flatten_mapping(node)
            return self._mapping(node, place)
        try:
            return Value(self.loader.construct_object(node), place, {})
        except ValueError as error:
            raise place.error(f"{node.value!r}: {error}; put it in quotes") from error

    def _mapping(self, node: yaml.MappingNode, place: Place) -> Value:
        content: dict[str, Value] = {}
        keys: dict[str, Place] = {}
        for key_node, value_node in node.value:
            key = self.loader.construct_object(key_node, deep=True)
            where = self.place(key_node)
            if not isinstance(key, str):
                raise where.error(f"key {key!r}: keys are text; put it in quotes")
            if key in keys:
                raise where.error(f"key {key!r} stands twice, first in line {keys[key].line}; keep one of them")
            content[key], keys[key] = self.value(value_node), where
        return Value(content, place, keys)
