"""recovery/data/rendering.py: chats as the tokenizer renders them (oracle), and templates without end or measure are stopped."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compresskit.errors import CheckpointError, CompresskitError
from compresskit.models.tokenizer import open_tokenizer
from compresskit.recovery.data import rendering
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.data.rendering import Chat, rendered

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
INSTRUCTIONS = [Instruction(i, "d.jsonl", [{"role": "user", "content": f"é {i}"}], f"yes {i}", "d") for i in range(50)]


@pytest.fixture
def tokenizer(tiny: dict[str, Path]) -> Any:
    return open_tokenizer(tiny["llama"])


def test_chats_are_rendered_as_the_tokenizer_renders_them(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer.chat_template = TEMPLATE
    expected = []
    for each in INSTRUCTIONS:
        answer = {"role": "assistant", "content": each.response}
        before = tokenizer.apply_chat_template(each.turns, tokenize=False, add_generation_prompt=True)
        expected.append(Chat(before, tokenizer.apply_chat_template([*each.turns, answer], tokenize=False)))
    assert rendered(INSTRUCTIONS, tokenizer) == expected
    monkeypatch.delattr("os.fork")
    assert rendered(INSTRUCTIONS, tokenizer) == expected
    assert rendered([], tokenizer) == []


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_template_without_end_is_stopped_in_any_thread(
    elsewhere: bool, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 1.0)
    tokenizer.chat_template = LOOP
    errors: list[CompresskitError] = []

    def call() -> None:
        with pytest.raises(CheckpointError) as caught:
            rendered(INSTRUCTIONS, tokenizer)
        errors.append(caught.value)

    started = time.monotonic()
    if elsewhere:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    else:
        call()
    assert time.monotonic() - started < 10
    assert f"{tokenizer.name_or_path}: the chat template takes more than 1 seconds" in str(errors[0])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'x' * 9999999999 }}", "MemoryError"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[7].content }}", "list object has no element 7"),
        ("{{ messages[0].content }}", "it does not show the answer"),
    ],
)
def test_a_template_that_fails_gives_a_reason_of_one_line_for_each_chat(template: str, reason: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    found = rendered(INSTRUCTIONS[:3], tokenizer)
    assert len(found) == 3
    assert all(isinstance(each, str) and reason in each and len(each.splitlines()) == 1 for each in found)


@pytest.mark.slow
def test_a_chat_that_becomes_too_large_ends_the_run(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ 'x' * 99999999 }}"
    with pytest.raises(CheckpointError, match=r"makes 200,.* bytes of one chat"):
        rendered(INSTRUCTIONS, tokenizer)


GEMMA_3 = (
    "{% if messages[0].role == 'system' %}{% set prefix = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}[{{ m.role }}]{{ prefix if loop.first else '' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Puts a system prompt before the first question."""
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
SILENT = TEMPLATE.replace("%}[{{ m['role'] }}]", "%}{% if m.role != 'system' %}[{{ m['role'] }}]").replace(
    "{% endfor", "{% endif %}{% endfor"
)
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize("template", [NO_SYSTEM, SILENT])
def test_where_the_template_takes_no_system_turn_its_text_stands_before_the_question(template: str, tokenizer: Any) -> None:
    """As Gemma 3's template has it, whose predecessors refuse system turns."""
    chats = [replace(each, turns=[SYSTEM, *each.turns]) for each in INSTRUCTIONS[:2]]
    tokenizer.chat_template = GEMMA_3
    expected = rendered(chats, tokenizer)
    tokenizer.chat_template = template
    assert rendered(chats, tokenizer) == [Chat(*each[:2], system_moved=True) for each in expected]
    assert [each.whole for each in expected if isinstance(each, Chat)] == [
        f"[user]Be brief.\n\né {i}[assistant]yes {i}" for i in range(2)
    ]
    assert all(not each.system_moved for each in rendered(INSTRUCTIONS[:2], tokenizer) if isinstance(each, Chat))


def test_a_template_that_shows_parts_alone_gets_parts(tokenizer: Any) -> None:
    """Those of some vision models walk through parts; of a plain text they would show nothing."""
    tokenizer.chat_template = TEMPLATE
    expected = rendered(INSTRUCTIONS, tokenizer)
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ m['content'] }}",
        "{% for part in m['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}",
    )
    assert rendered(INSTRUCTIONS, tokenizer) == expected


def test_calls_that_the_template_does_not_show_are_a_reason(tokenizer: Any) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    called = Instruction(0, "d.jsonl", INSTRUCTIONS[0].turns, "", "d", {"tool_calls": calls})
    tokenizer.chat_template = TEMPLATE
    assert rendered([called], tokenizer) == ["it shows no tool calls"]
    tokenizer.chat_template = TEMPLATE.replace("{% endfor", "{{ m.tool_calls[0].function.name if m.tool_calls }}{% endfor")
    assert rendered([called], tokenizer) == [Chat("[user]é 0[assistant]", "[user]é 0[assistant]add")]


THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)


@pytest.mark.parametrize(
    ("written", "before", "learned"),
    [
        ("", "[user]é 0[end][assistant]", "yes 0[end]"),
        ("<think></think>", "[user]é 0[end][assistant]<think>", "</think>yes 0[end]"),
    ],
)
def test_what_is_learned_begins_where_the_opened_and_the_written_answer_differ(
    written: str, before: str, learned: str, tokenizer: Any
) -> None:
    """As trl has it (apply_chat_template of its data_utils.py), for templates such as DeepSeek-R1's and Nemotron's."""
    tokenizer.chat_template = THINKING.replace("{{ m.content", f"{{{{ '{written}' if m.role == 'assistant' }}}}{{{{ m.content")
    (chat,) = rendered(INSTRUCTIONS[:1], tokenizer)
    assert chat == Chat(before, before + learned)


def test_a_template_that_joins_the_arguments_of_a_call_gets_their_text(tokenizer: Any) -> None:
    """As DeepSeek-V3's does; others take them as an object."""
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é"}}}]
    called = Instruction(0, "d.jsonl", INSTRUCTIONS[0].turns, "", "d", {"tool_calls": calls})
    tokenizer.chat_template = TEMPLATE.replace(
        "{% endfor", "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor", 1
    )
    assert rendered([called], tokenizer) == [Chat("[user]é 0[assistant]", '[user]é 0[assistant]add{"a": 1, "b": "é"}')]
