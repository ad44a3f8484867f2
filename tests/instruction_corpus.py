"""Instruction data as other tools write it, each row with the exact text that is to be learned from it."""

from __future__ import annotations

import json
from typing import Any

TEMPLATE = (
    "{% for tool in tools or [] %}[tools]{{ tool.function.name }}[end]{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}</call>"
    "{% endfor %}[end]{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""A chat template that shows whatever a message holds."""

USER, ANSWER = {"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3."}
HUMAN, GPT = {"from": "human", "value": "Add 1 and 2."}, {"from": "gpt", "value": "It is 3."}
SYSTEM = {"role": "system", "content": "Be brief."}
PLAIN = "[user]Add 1 and 2.[end][assistant]", "It is 3.[end]"
WITH_SYSTEM = "[system]Be brief.[end]" + PLAIN[0], PLAIN[1]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
CALLED = '[assistant]<call>add {"a": 1, "b": 2}</call>[end]'
WITH_TOOLS = f"[tools]add[end][user]Add 1 and 2.[end]{CALLED}[tool]3[end][assistant]", "It is 3.[end]"
TOOL_TURNS = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "3"},
]


def parts(*texts: str) -> list[dict[str, str]]:
    """A message's content in OpenAI's parts."""
    return [{"type": "text", "text": text} for text in texts]


def lines(*rows: dict[str, Any]) -> bytes:
    """A file of JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "alpaca": ({"instruction": "Add 1 and 2.", "input": "", "output": "It is 3."}, PLAIN),
    "alpaca with an input": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
        ("[user]Add.\n\n1 and 2[end][assistant]", "3[end]"),
    ),
    "alpaca, missing input as pandas writes it": (
        {"instruction": "Add 1 and 2.", "input": float("nan"), "output": "It is 3."},
        PLAIN,
    ),
    "LLaMA-Factory alpaca with system and history": (
        {"instruction": "And 3?", "input": "", "output": "6", "system": "Be brief.", "history": [["Add 1 and 2.", "It is 3."]]},
        ("[system]Be brief.[end][user]Add 1 and 2.[end][assistant]It is 3.[end][user]And 3?[end][assistant]", "6[end]"),
    ),
    "alpaca with an empty history": (
        {"instruction": "Add 1 and 2.", "output": "It is 3.", "system": "", "history": []},
        PLAIN,
    ),
    "dolly": (
        {"instruction": "Add.", "context": "1 and 2", "response": "3"},
        ("[user]Add.\n\n1 and 2[end][assistant]", "3[end]"),
    ),
    "OpenOrca": ({"system_prompt": "Be brief.", "question": "Add 1 and 2.", "response": "It is 3."}, WITH_SYSTEM),
    "question and answer": ({"question": "Add 1 and 2.", "answer": "It is 3."}, PLAIN),
    "question, context and answer": (
        {"question": "Add.", "context": "1 and 2", "answer": "3"},
        ("[user]Add.\n\n1 and 2[end][assistant]", "3[end]"),
    ),
    "an answer that is 0": ({"question": "1 - 1?", "answer": 0}, ("[user]1 - 1?[end][assistant]", "0[end]")),
    "an answer that is a number": ({"question": "7 / 2?", "answer": 3.5}, ("[user]7 / 2?[end][assistant]", "3.5[end]")),
    "trl prompt and completion": ({"prompt": "Add 1 and 2.", "completion": "It is 3."}, PLAIN),
    "trl conversational prompt and completion": ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, WITH_SYSTEM),
    "trl messages": ({"messages": [SYSTEM, USER, ANSWER]}, WITH_SYSTEM),
    "trl messages in parts": (
        {
            "messages": [
                {"role": "user", "content": parts("Add 1 ", "and 2.")},
                {"role": "assistant", "content": parts("It is 3.")},
            ]
        },
        PLAIN,
    ),
    "trl conversational prompt in parts": (
        {
            "prompt": [{"role": "user", "content": parts("Add 1 and 2.")}],
            "completion": [{"role": "assistant", "content": parts("It is 3.")}],
        },
        PLAIN,
    ),
    "several turns, of which the last answer is learned": (
        {"messages": [USER, ANSWER, {"role": "user", "content": "And 3?"}, {"role": "assistant", "content": "6"}]},
        ("[user]Add 1 and 2.[end][assistant]It is 3.[end][user]And 3?[end][assistant]", "6[end]"),
    ),
    "ShareGPT": ({"conversations": [HUMAN, GPT]}, PLAIN),
    "ShareGPT with a system turn": ({"conversations": [{"from": "system", "value": "Be brief."}, HUMAN, GPT]}, WITH_SYSTEM),
    "LLaMA-Factory ShareGPT with system beside": (
        {"conversations": [HUMAN, GPT], "system": "Be brief.", "tools": ""},
        WITH_SYSTEM,
    ),
    "LLaMA-Factory ShareGPT with tools": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
                {"from": "observation", "value": "3"},
                GPT,
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
        WITH_TOOLS,
    ),
    "axolotl, an answer that is not to be learned": (
        {"conversations": [HUMAN, GPT, {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "No!", "train": False}]},
        PLAIN,
    ),
    "OpenAI, an answer of no weight": (
        {"messages": [USER, ANSWER | {"weight": 1}, USER, {"role": "assistant", "content": "5", "weight": 0}]},
        PLAIN,
    ),
    "OpenAI tools": ({"messages": [*TOOL_TURNS, ANSWER], "tools": [TOOL]}, WITH_TOOLS),
    "OpenAI tool call as the answer": (
        {"messages": TOOL_TURNS[:2], "tools": [TOOL]},
        ("[tools]add[end][user]Add 1 and 2.[end][assistant]", '<call>add {"a": 1, "b": 2}</call>[end]'),
    ),
    "OpenAI functions, before there were tools": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": CALL["function"]},
                {"role": "function", "name": "add", "content": "3"},
                ANSWER,
            ],
            "functions": [TOOL["function"]],
        },
        WITH_TOOLS,
    ),
    "OpenAI developer turn": ({"messages": [{"role": "developer", "content": "Be brief."}, USER, ANSWER]}, WITH_SYSTEM),
    "a thought beside the answer": (
        {"messages": [USER, ANSWER | {"reasoning_content": "1 + 2 = 3"}]},
        ("[user]Add 1 and 2.[end][assistant]", "<think>1 + 2 = 3</think>It is 3.[end]"),
    ),
    "a thought in the answer": (
        {"messages": [USER, {"role": "assistant", "content": "<think>\n1 + 2 = 3\n</think>\n\nIt is 3."}]},
        ("[user]Add 1 and 2.[end][assistant]", "<think>\n1 + 2 = 3\n</think>\n\nIt is 3.[end]"),
    ),
    "every row has the keys of all": (
        {
            "messages": None,
            "conversations": [],
            "instruction": "Add 1 and 2.",
            "input": None,
            "output": "It is 3.",
            "tools": None,
        },
        PLAIN,
    ),
    "other characters": (
        {"instruction": "Übersetze: 你好 👋", "output": "Hallo\u2028da\r\n\tй"},
        ("[user]Übersetze: 你好 👋[end][assistant]", "Hallo\u2028da\r\n\tй[end]"),
    ),
}
"""By name: a row, and what stands before the answer and in it."""

FILES: dict[str, tuple[str, bytes]] = {
    "carriage returns": ("jsonl", lines(ROWS["alpaca"][0]).replace(b"\n", b"\r\n")),
    "a byte order mark": ("jsonl", b"\xef\xbb\xbf" + lines(ROWS["alpaca"][0])),
    "a byte order mark in a list": ("json", b"\xef\xbb\xbf" + json.dumps([ROWS["alpaca"][0]], indent=1).encode()),
    "blank lines and no end of line": ("jsonl", b"\n\n" + lines(ROWS["alpaca"][0]).strip() + b"\n  \n"),
}
"""By name: suffix and bytes of a file of which PLAIN is learned."""

DROPPED: dict[str, tuple[dict[str, Any], str]] = {
    "no answer": ({"instruction": "Add.", "output": ""}, "empty"),
    "an answer that is missing, as pandas writes it": ({"instruction": "Add.", "output": float("nan")}, "empty"),
    "no turn of the assistant": ({"messages": [USER]}, "empty"),
    "no question": ({"messages": [ANSWER]}, "empty"),
    "only answers that are not to be learned": ({"messages": [USER, ANSWER | {"weight": 0}]}, "empty"),
    "an answer that is an object": ({"question": "Who?", "answer": {"value": "Ada", "aliases": ["A. L."]}}, "not text"),
    "an answer that is a list": ({"question": "Who?", "answer": ["Ada", "Grace"]}, "not text"),
    "an answer that is true": ({"question": "Is it?", "answer": True}, "not text"),
    "an answer that is infinite": ({"question": "How much?", "answer": float("inf")}, "not text"),
    "a context that is an object": ({"question": "Who?", "context": {"title": "t"}, "answer": "Ada"}, "not text"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}, *parts("What?")]}, ANSWER]},
        "not text",
    ),
    "a turn without content": ({"messages": [USER, {"role": "assistant"}, USER, ANSWER]}, "not text"),
    "a turn whose content is an object": ({"messages": [USER, {"role": "assistant", "content": {"text": "3"}}]}, "not text"),
    "a history that is no pairs": ({"instruction": "Add.", "output": "3", "history": "earlier"}, "not text"),
    "the number of a choice": ({"question": "Which?", "choices": ["a cat", "a dog"], "answer": 1}, "multiple choice"),
    "the letter of a choice": ({"question": "Which?", "options": {"A": "a cat", "B": "a dog"}, "answer": "B"}, "multiple choice"),
    "a speaker nobody knows": ({"messages": [USER, {"role": "narrator", "content": "x"}, ANSWER]}, "unknown speaker"),
    "a turn without a speaker": ({"messages": [USER, {"content": "x"}]}, "unknown speaker"),
    "turns that are texts": ({"messages": ["Add 1 and 2.", "It is 3."]}, "unknown speaker"),
    "half of a surrogate pair": ({"instruction": "Add \ud800.", "output": "3"}, "half of a surrogate pair"),
    "a call without a name": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
        "unreadable tool call",
    ),
    "a call whose arguments are no JSON": (
        {
            "messages": [
                USER,
                {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": "{"}}]},
            ]
        },
        "unreadable tool call",
    ),
    "tools that are no JSON": ({"messages": [USER, ANSWER], "tools": "add(a, b)"}, "unreadable tools"),
    "no field for the answer": ({"prompt": "Add.", "chosen": "3", "rejected": "4"}, "no response field"),
    "no field for the question": ({"output": "3"}, "no instruction or prompt field"),
}
"""By name: a row that teaches nothing, and the reason under which it is counted."""
