"""Which shape a row has, and the conversation in it.

    messages         messages or conversations: a list of messages
    alpaca           instruction, input, output (or response), and LLaMA-Factory's system and history [[question, answer], ...]
    dolly            instruction, context, response
    prompt-response  prompt, question, query or input; response, completion, answer or output; each a text or messages (trl)

A row of any shape may hold `system` (or `system_prompt`) and `tools`. Keys without a value count as absent: where rows of
different shapes share a file or a table, every row has the keys of all.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from compresskit.checkpoint.small_files import shown
from compresskit.recovery.data.files import Row
from compresskit.recovery.data.turns import (
    NOT_TEXT,
    Turn,
    Turns,
    Unlearnable,
    first_given,
    is_blank,
    is_conversation,
    is_missing,
    text_of,
    tools_of,
    turn_of,
    turns_of,
)

CONVERSATIONS = ("messages", "conversations")
INSTRUCTION = "instruction"
PROMPTS = (INSTRUCTION, "prompt", "question", "query", "input")
RESPONSES = ("response", "completion", "answer", "output")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
TOOLS = ("tools", "functions")
CHOICES = ("choices", "options")
SHOWN_KEYS = 8
SHOWN_KEY = 40
"""Keys of a row, and characters of each, that an error lists."""
EMPTY = "empty"
SURROGATE = re.compile(r"[\ud800-\udfff]")


class Conversation(NamedTuple):
    """What a row teaches: all turns up to an answer, the answer, and the tools that may be called."""

    turns: Turns
    answer: Turn
    tools: list[dict[str, Any]]


def shape_of(row: Row) -> str:
    """Name of a row's shape; raises Unlearnable, which lists the row's keys, if no shape fits."""
    if _conversation_key(row):
        return "messages"
    keys = ", ".join(repr(key[:SHOWN_KEY]) for key in list(row)[:SHOWN_KEYS])
    if not any(key in row for key in RESPONSES):
        raise Unlearnable("no response field", f"keys: {keys}")
    if not any(key in row for key in PROMPTS):
        raise Unlearnable("no instruction or prompt field", f"keys: {keys}")
    if is_missing(row.get(INSTRUCTION)):
        return "prompt-response"
    return "dolly" if next((key for key in CONTEXTS if key in row), "input") == "context" else "alpaca"


def conversation_of(row: Row) -> Conversation:
    """The conversation in a row of a known shape; raises Unlearnable if there is none, or something in it is no text."""
    key = _conversation_key(row)
    turns = [turn_of(message) for message in row[key]] if key else _turns_of_fields(row)
    learned = [turn["role"] == "assistant" and (key is None or _is_learned(row[key][i])) for i, turn in enumerate(turns)]
    if not any(learned):
        raise Unlearnable(EMPTY)
    last = max(index for index, is_learned in enumerate(learned) if is_learned)
    answer = turns[last] | {"content": turns[last]["content"].strip()}
    tools = first_given(row, TOOLS)
    found = Conversation([*_system(row, turns), *turns[:last]], answer, tools_of(row[tools]) if tools else [])
    _check(found)
    return found


def _conversation_key(row: Row) -> str | None:
    return next((key for key in CONVERSATIONS if isinstance(row.get(key), list) and row[key]), None)


def _system(row: Row, turns: Turns) -> Turns:
    """The turn of a system prompt beside the conversation; one in the conversation comes before it."""
    key = first_given(row, SYSTEMS)
    if key is None or turns[0]["role"] == "system":
        return []
    return [{"role": "system", "content": text_of(row[key], key)}]


def _is_learned(message: dict[str, Any]) -> bool:
    """Whether an answer is to be learned: OpenAI's and axolotl's marks say no with a weight of 0, or `train: false`."""
    return message.get("weight") != 0 and message.get("train") is not False


def _turns_of_fields(row: Row) -> Turns:
    response, prompt = first_given(row, RESPONSES), first_given(row, PROMPTS)
    if response is None or prompt is None:
        raise Unlearnable(EMPTY)
    if any(isinstance(row.get(key), list | dict) and row[key] for key in CHOICES) and _is_label(row[response]):
        raise Unlearnable("multiple choice", f"{response} is {shown(row[response])}, one of several; write its text")
    contexts = [part for part in (text_of(row.get(key), key).strip() for key in CONTEXTS if key != prompt) if part]
    asked = turns_of(row[prompt], "user", prompt)
    if is_conversation(row[prompt]):
        if contexts:
            raise Unlearnable(NOT_TEXT, f"{prompt} holds messages, and there is a context beside it")
    else:
        asked[0]["content"] = "\n\n".join([asked[0]["content"].strip(), *contexts])
    return [*_history(row.get("history")), *asked, *turns_of(row[response], "assistant", response)]


def _is_label(answer: object) -> bool:
    """Whether an answer is the number or the letter of a choice."""
    return isinstance(answer, int | float) or (isinstance(answer, str) and len(answer.strip()) == 1)


def _history(value: object) -> Turns:
    """Earlier turns: LLaMA-Factory's pairs of question and answer, or messages."""
    if is_missing(value) or is_blank(value):
        return []
    if is_conversation(value):
        return turns_of(value, "user", "history")
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise Unlearnable(NOT_TEXT, f"history is {shown(value)}")
    said = [(role, text) for pair in value for role, text in zip(("user", "assistant"), pair, strict=True)]
    return [{"role": role, "content": text_of(text, "history")} for role, text in said]


def _check(found: Conversation) -> None:
    """Raise Unlearnable unless there is a question and an answer, all of whole characters."""
    asked = any(turn["content"].strip() for turn in found.turns if turn["role"] == "user")
    if not asked or not (found.answer["content"] or found.answer.get("tool_calls")):
        raise Unlearnable(EMPTY)
    if SURROGATE.search(json.dumps(found, ensure_ascii=False)):
        raise Unlearnable("half of a surrogate pair")
