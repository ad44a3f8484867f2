"""Turns of a conversation in the form that chat templates take, from the forms in which data sets write them.

    text       a string, a number, or parts [{"type": "text", "text": ...}]; nothing else is text
    message    {role, content} of OpenAI, or {from, value} of ShareGPT
    tool call  {"function": {"name", "arguments"}} or {"name", "arguments"}, arguments as an object or as its JSON; or
               LLaMA-Factory's speaker "function_call", whose value is the JSON of one call or of several

A template takes the arguments of a call as an object, never as JSON (the chat templating guide of transformers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from compresskit.checkpoint.small_files import json_value, shown

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "developer": "system", "tool": "tool", "function": "tool",
    "observation": "tool", "tool_response": "tool", "function_call": "assistant", "tool_call": "assistant",
}  # fmt: skip
"""Role of a turn, by the speaker names used in data sets."""
SPEAKERS, CONTENTS = ("role", "from"), ("content", "value")
CALLERS = ("function_call", "tool_call")
"""Speakers whose text is the JSON of calls."""
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of a message under which templates look for what a model thought."""
NOT_TEXT = "not text"
UNKNOWN_SPEAKER = "unknown speaker"
BAD_CALL = "unreadable tool call"

Turn = dict[str, Any]
"""{"role": ..., "content": a text}, and where it has them `tool_calls`, `name`, `tool_call_id` and one of `THOUGHTS`."""
Turns = list[Turn]


class Unlearnable(Exception):
    """A row teaches nothing: the reason, under which it is counted, and what was found."""

    def __init__(self, reason: str, found: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.found = found


def is_missing(value: object) -> bool:
    """Whether a value stands for none: null, or the NaN that pandas writes for a missing text."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_blank(value: object) -> bool:
    """Whether a text or a list holds nothing."""
    return not value.strip() if isinstance(value, str) else isinstance(value, list | dict) and not value


def first_given(row: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of these keys that has a value, blank texts and empty lists aside."""
    return next((key for key in keys if not is_missing(row.get(key)) and not is_blank(row[key])), None)


def text_of(value: object, what: str) -> str:
    """The text that a value holds, "" for none; raises Unlearnable, which names `what` it is, if it is no text."""
    if isinstance(value, str):
        return value
    if is_missing(value):
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, list) and all(_is_text_part(part) for part in value):
        return "".join(part["text"] for part in value)  # as templates do that walk through parts
    raise Unlearnable(NOT_TEXT, f"{what} is {shown(value)}")


def _is_text_part(part: object) -> bool:
    return isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)


def is_conversation(value: object) -> bool:
    """Whether this is a list of messages, all with a speaker."""
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and _speaker(each) for each in value)


def turns_of(value: object, role: str, what: str) -> Turns:
    """The turns that a value holds: those of its messages, or one with this role; raises Unlearnable."""
    if isinstance(value, list) and is_conversation(value):
        return [turn_of(message) for message in value]
    return [{"role": role, "content": text_of(value, what)}]


def _speaker(message: dict[str, Any]) -> object:
    key = first_given(message, SPEAKERS)
    return None if key is None else message[key]


def turn_of(message: object) -> Turn:
    """The turn that a message stands for; raises Unlearnable."""
    speaker = _speaker(message) if isinstance(message, dict) else None
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None or not isinstance(message, dict):
        raise Unlearnable(UNKNOWN_SPEAKER, shown(speaker if speaker else message))
    given = first_given(message, CONTENTS)
    if given and str(speaker).lower() in CALLERS:
        calls = _parsed(message[given], BAD_CALL)
        return {
            "role": role,
            "content": "",
            "tool_calls": [_call(each) for each in (calls if isinstance(calls, list) else [calls])],
        }
    calls = _calls_of(message)
    if not calls and not any(key in message for key in CONTENTS):
        raise Unlearnable(NOT_TEXT, f"a turn of {shown(speaker)} has no content")
    turn: Turn = {"role": role, "content": text_of(message[given], f"a turn of {shown(speaker)}") if given else ""}
    if calls:
        turn["tool_calls"] = calls
    for key in ("name", "tool_call_id", *THOUGHTS):
        if isinstance(message.get(key), str) and message[key]:
            turn[key] = message[key]
    return turn


def _calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    given = message.get("tool_calls")
    legacy = message.get("function_call")
    if isinstance(legacy, dict) and not given:
        given = [legacy]
    if is_missing(given) or is_blank(given):
        return []
    if not isinstance(given, list):
        raise Unlearnable(BAD_CALL, shown(given))
    return [_call(each) for each in given]


def _call(given: object) -> dict[str, Any]:
    inner = given.get("function", given) if isinstance(given, dict) else None
    if not isinstance(given, dict) or not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise Unlearnable(BAD_CALL, shown(given))
    arguments = inner.get("arguments", {})
    arguments = _parsed(arguments or "{}", BAD_CALL) if isinstance(arguments, str) else arguments or {}
    if not isinstance(arguments, dict):
        raise Unlearnable(BAD_CALL, shown(given))
    kept = {"id": given["id"]} if isinstance(given.get("id"), str) else {}
    return {**kept, "type": "function", "function": {"name": inner["name"], "arguments": arguments}}


def tools_of(value: object) -> list[dict[str, Any]]:
    """Descriptions of the tools that a model may call, as `tools` of a chat template; raises Unlearnable."""
    if is_missing(value) or is_blank(value):
        return []
    tools = _parsed(value, "unreadable tools") if isinstance(value, str) else value
    found: list[dict[str, Any]] = []
    for tool in tools if isinstance(tools, list) else [None]:
        described = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(tool, dict) or not isinstance(described, dict) or not isinstance(described.get("name"), str):
            raise Unlearnable("unreadable tools", shown(value))
        found.append({"type": "function", "function": tool} if described is tool else tool)
    return found


def _parsed(value: object, reason: str) -> Any:
    """JSON in a text, anything else as it is; raises Unlearnable if it is no JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json_value(value)
    except ValueError as error:
        raise Unlearnable(reason, shown(value)) from error
