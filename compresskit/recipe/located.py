"""YAML values with their file and line, so that errors show the position."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import RequestError, near_miss

LARGEST_FILE_BYTES = 1 << 17
"""A recipe is written by hand; a file above 128 KiB is something else."""
MOST_NODES = 10_000
"""Keys and values; aliases of aliases can expand to billions."""
DEEPEST = 20
"""A setting's list lies five levels deep."""
LONGEST_KEY = 100
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's where PyYAML was built with it, ten times as fast."""
MERGE = "tag:yaml.org,2002:merge"
LARGEST_BITS = 64
"""Of a whole number."""
PLAIN = (str, int, float, bool, type(None))


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
        return "nothing" if self.content in (None, "") else shown(self.content)

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
    if not path.is_file():
        reason = "is not there" if not path.exists() else "is no file"
        raise RecipeError(f"{path}: cannot be read (it {reason}); check the path, or see compresskit run --list")
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
    loader = None
    try:
        _check_size(text, name)
        loader = LOADER(text)
        node = loader.get_single_node()
        if node is None:
            raise Place(name, 1).error("is empty; a recipe has at least source and steps")
        return _Converter(loader, name).value(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(f"{error.context or ''} {error.problem or ''}".split())
        raise Place(name, mark.line + 1 if mark else 1).error(f"not valid YAML: {problem}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise Place(name, 1).error(f"not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_size(text: str, name: str) -> None:
    """Count values and levels while the text is scanned, before anything is built from it."""
    count = depth = 0
    for event in yaml.parse(text, LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        count += isinstance(event, yaml.NodeEvent)
        if depth > DEEPEST or count > MOST_NODES:
            what = f"nested more than {DEEPEST} levels deep" if depth > DEEPEST else f"more than {MOST_NODES} values"
            raise Place(name, event.start_mark.line + 1).error(f"{what}; give the YAML file of a recipe")


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
        self._count(place)
        if id(node) in self.above:
            raise place.error("an alias that contains itself; write the values out")
        if len(self.above) > DEEPEST:
            raise place.error(f"nested more than {DEEPEST} levels deep; write the values out")
        self.above.add(id(node))
        try:
            return self._converted(node, place)
        finally:
            self.above.discard(id(node))

    def _count(self, place: Place) -> None:
        self.count += 1
        if self.count > MOST_NODES:
            raise place.error(f"more than {MOST_NODES} values; aliases that repeat aliases are not unfolded")

    def _converted(self, node: yaml.Node, place: Place) -> Value:
        if isinstance(node, yaml.SequenceNode):
            return Value([self.value(item) for item in node.value], place, {})
        if isinstance(node, yaml.MappingNode):
            return self._mapping(self._pairs(node, 0), place)
        return Value(self._scalar(node, place), place, {})

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        """The scalar; raises RecipeError for dates, bytes, and numbers that are not finite or have too many digits."""
        try:
            found = self.loader.construct_object(node)
        except (ValueError, OverflowError, TypeError) as error:
            raise place.error(f"{shown(node.value)}: {first_line(error)}; put it in quotes") from error
        if not isinstance(found, PLAIN) or (isinstance(found, float) and not math.isfinite(found)):
            raise place.error(f"{shown(node.value)}: is read as {shown(found)}; put it in quotes, or write a finite number")
        if isinstance(found, str) and not _encodes(found):
            raise place.error(f"{shown(found)}: half of a surrogate pair; write the character itself")
        if isinstance(found, int) and abs(found) >> LARGEST_BITS:
            raise place.error(f"{shown(node.value)}: no setting takes so large a number; correct it")
        return found

    def _pairs(self, node: yaml.MappingNode, depth: int) -> list[tuple[yaml.Node, yaml.Node]]:
        """The keys and values of a mapping; those of mappings merged with `<<` first, each counted."""
        merged: list[tuple[yaml.Node, yaml.Node]] = []
        own = []
        for key_node, value_node in node.value:
            self._count(self.place(key_node))
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.place(key_node).error("a key of several values: keys are text; put it in quotes")
            if key_node.tag != MERGE:
                own.append((key_node, value_node))
                continue
            several = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            if depth > DEEPEST or not all(isinstance(each, yaml.MappingNode) for each in several):
                raise self.place(key_node).error("<<: expected keys and values to merge; write them out")
            # Of several mappings the first one wins; what is found later replaces what was found before.
            for each in reversed(several):
                merged += self._pairs(each, depth + 1)
        names = {key.value for key, _ in own}
        return [(key, value) for key, value in _last_of_each(merged) if key.value not in names] + own

    def _mapping(self, pairs: list[tuple[yaml.Node, yaml.Node]], place: Place) -> Value:
        content: dict[str, Value] = {}
        keys: dict[str, Place] = {}
        for key_node, value_node in pairs:
            where = self.place(key_node)
            key = self._scalar(key_node, where)
            if not isinstance(key, str):
                raise where.error(f"key {shown(key)}: keys are text; put it in quotes")
            if len(key) > LONGEST_KEY or not key.isprintable():
                raise where.error(f"key {shown(key)}: keys are at most {LONGEST_KEY} printable characters; correct it")
            if key in keys:
                raise where.error(f"key {key!r} stands twice, first in line {keys[key].line}; keep one of them")
            content[key], keys[key] = self.value(value_node), where
        return Value(content, place, keys)


def _last_of_each(pairs: list[tuple[yaml.Node, yaml.Node]]) -> list[tuple[yaml.Node, yaml.Node]]:
    """Of pairs with equal keys the last, in the order of the first."""
    return list({(type(key), str(key.value)): (key, value) for key, value in pairs}.values())


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
