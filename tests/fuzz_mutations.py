"""Ways to damage a file: byte by byte, and by its structure, so that the readers' deeper checks are reached as well."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

RAW = "@raw-{}@"
DEEP = "[" * 60 + "]" * 60
RAWS = (
    "1" * 50, "1" * 5000, "-" + "9" * 30, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\u0000"', DEEP,
    "[" * 3000 + "]" * 3000, "0.5", "1e3", "{}", "[]", "null", '{"a": 1, "a": 2}', '"a\\nb"', "01", "tru", '"' + "x" * 3000 + '"',
)  # fmt: skip
"""JSON texts that `json.dumps` would not write, or not alike."""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 8, 16, 31, 64, 255, 1000, 65536, 10**6, 10**9, 10**12, 2**31, 2**31 - 1, 2**32,
    2**63, 2**64, -(2**63), 0.0, -0.5, 1.5, 1e308, 1e-308, "", " ", "4", "x", "true", "../x", "/etc/passwd", ".", "..",
    "a/b", "a\\b", "x\x00y", "-", "~", "${HOME}", "${a}", "self", "demo:x", "model.safetensors", "F8_E5M2", "F32", "I64", "U8",
    "re:.*", "re:(",
    [], [[]], {}, [1], [1, 2], [None], ["a"], {"a": None}, {"": 1}, [[1, 2], [3]], {"a": {"a": {}}}, "é", "漢" * 20,
    "\u2028", "{x",
)  # fmt: skip
BYTES = (b"\x00", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b'"', b"{", b"}", b"[", b"]", b",", b":",
         b"\\", b"-", b"0", b"9" * 40, b"\x7f", b"\x85", b"\xe2\x80\xa8", b"PAR1", b"\x15\x00",
         b"\xff\xff\xff\x7f", b"\xff" * 8)  # fmt: skip
YAML_BITS = (
    "&a ", "*a", "<<: *a\n", "!!binary x", "!!python/object:os.system x", "${HOME}", "${source}", "${here}", ".inf", ".nan",
    "2001-99-99",
    "2001-01-01", "1:2:3", "? ", "| ", "> ", "\t", "- ", ": ", "%YAML 9.9\n", "---\n", "...\n", "!!set {a}", "!!omap [a: 1]",
    "[", "{", "}",
    "0x" + "f" * 40, "1" * 5000, "~", "'", '"', "#", "\u0085", "\x07", "@", "`", "{{a: b}: c}", "&a [*a]",
    "name: ", "source: ", "matrix: {x: '**'}\n",
)  # fmt: skip

Mutate = Callable[[bytes, random.Random], bytes]


def bytewise(data: bytes, pick: random.Random) -> bytes:
    """Flip, cut, insert, remove, repeat or overwrite bytes, once or a few times."""
    changed = bytearray(data)
    for _ in range(pick.choice((1, 1, 1, 2, 4))):
        size = len(changed)
        place = pick.randrange(size + 1) if pick.random() < 0.7 else max(0, size - pick.randrange(min(size, 64) + 1))
        length = pick.choice((1, 2, 4, 8, 30, 300))
        kind = pick.randrange(7)
        if kind == 0 and place < size:
            changed[place] ^= 1 << pick.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = pick.choice(BYTES)
        elif kind == 3:
            del changed[place : place + length]
        elif kind == 4:
            changed[place:place] = changed[place : place + length] * pick.choice((1, 2, 50))
        elif kind == 5:
            changed[place : place + length] = pick.randbytes(min(length, size - place))
        else:
            new = pick.choice(BYTES)
            changed[place : place + len(new)] = new
    return bytes(changed)


def flipped_cut_or_swapped(data: bytes, kind: str, a: int, b: int) -> bytes:
    """A bit flipped, the end cut off, or two pieces that change places; `a` and `b` say where."""
    changed, place, other = bytearray(data), a % len(data), b % len(data)
    if kind == "flip":
        changed[place] ^= 1 << b % 8
    elif kind == "cut":
        del changed[place:]
    elif kind == "swap":
        length = min(300, len(data) - max(place, other))
        one, two = data[place : place + length], data[other : other + length]
        changed[place : place + length], changed[other : other + length] = two, one
    else:
        raise ValueError(f"there is no damage {kind}")
    return bytes(changed)


def changed_tree(tree: Any, pick: random.Random) -> str:
    """A JSON text of the tree with one to three values or keys replaced, removed, renamed, exchanged or repeated."""
    tree = json.loads(json.dumps(tree))
    raws: list[str] = []
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        parents = [tree] if isinstance(tree, (dict, list)) else []
        for each in parents:
            inside = each.values() if isinstance(each, dict) else each
            parents.extend(value for value in inside if isinstance(value, (dict, list)))
        parents = [each for each in parents if each]
        if not parents:
            return pick.choice(RAWS)
        parent = pick.choice(parents)
        key = pick.choice(list(parent)) if isinstance(parent, dict) else pick.randrange(len(parent))
        _change(parent, key, pick, raws)
    text = json.dumps(tree, ensure_ascii=pick.random() < 0.5)
    for number, raw in enumerate(raws):
        text = text.replace(f'"{RAW.format(number)}"', raw)
    return text


def _change(parent: Any, key: Any, pick: random.Random, raws: list[str]) -> None:
    kind = pick.randrange(8)
    value = parent[key]
    if kind <= 2:
        parent[key] = json.loads(json.dumps(pick.choice(VALUES)))
    elif kind == 3:
        parent[key] = RAW.format(len(raws))
        raws.append(pick.choice(RAWS))
    elif kind == 4:
        del parent[key]
    elif kind == 5 and isinstance(parent, dict):
        parent[str(pick.choice(VALUES))] = parent.pop(key)
    elif kind == 6 and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = pick.choice((value + 1, value - 1, value * 2, -value, value // 2, str(value), [value], float(value)))
    elif isinstance(value, str):
        parent[key] = pick.choice((value[:-1], value + "x", value * 2, value.upper(), [value], {value: value}, f"../{value}"))
    else:
        parent[key] = pick.choice(([value], [value, value], {"a": value}))


def as_json(data: bytes, pick: random.Random) -> bytes:
    """Change the tree of a JSON file three times of four, its bytes otherwise."""
    if pick.random() < 0.25:
        return bytewise(data, pick)
    return changed_tree(json.loads(data), pick).encode("utf-8", "surrogatepass")


def as_lines(data: bytes, pick: random.Random) -> bytes:
    """Change the tree of one line of a JSONL file, the order of its lines, or its bytes."""
    lines = data.split(b"\n")
    place = pick.randrange(len(lines))
    kind = pick.random()
    if kind < 0.25 or not lines[place].strip():
        return bytewise(data, pick)
    if kind < 0.3:
        lines[place] = lines[place] + lines[pick.randrange(len(lines))]
    else:
        lines[place] = as_json(lines[place], pick)
    return b"\n".join(lines)


def as_yaml(data: bytes, pick: random.Random) -> bytes:
    """Change the lines and marks of a YAML file; JSON, which is YAML, is changed as a tree."""
    if data.startswith(b"{"):
        return as_json(data, pick)
    if pick.random() < 0.25:
        return bytewise(data, pick)
    text = data.decode()
    for _ in range(pick.choice((1, 1, 2, 3))):
        lines = text.split("\n")
        place = pick.randrange(len(lines))
        kind = pick.randrange(5)
        if kind == 0:
            at = pick.randrange(len(text) + 1)
            text = text[:at] + pick.choice(YAML_BITS) + text[at:]
            continue
        if kind == 1:
            key, mark, _ = lines[place].partition(": ")
            value = pick.choice(YAML_BITS) if pick.random() < 0.5 else json.dumps(pick.choice(VALUES))
            lines[place] = f"{key}{mark or ': '}{value}"
        elif kind == 2:
            del lines[place]
        elif kind == 3:
            lines.insert(place, lines[pick.randrange(len(lines))])
        else:
            lines[place] = " " * pick.randrange(6) + lines[place].lstrip()
        text = "\n".join(lines)
    return text.encode("utf-8", "surrogatepass")


def as_safetensors(data: bytes, pick: random.Random) -> bytes:
    """Change the header's tree and keep the lengths right, or change bytes, of which most are in the header."""
    size = struct.unpack("<Q", data[:8])[0]
    kind = pick.random()
    if kind < 0.2:
        return bytewise(data, pick)
    if kind < 0.4:
        return bytewise(data[: 8 + size], pick) + data[8 + size :]
    header = changed_tree(json.loads(data[8 : 8 + size]), pick).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + size :]
