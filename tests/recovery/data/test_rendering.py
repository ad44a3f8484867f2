"""recovery/data/rendering.py: chats as the tokenizer renders them (oracle), and templates without end or measure are stopped."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from compresskit.errors import CheckpointError, CompresskitError, RequestError
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


def test_chats_are_rendered_as_the_tokenizer_renders_them(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    expected = []
    for each in INSTRUCTIONS:
        answer = {"role": "assistant", "content": each.response}
        before = tokenizer.apply_chat_template(each.turns, tokenize=False, add_generation_prompt=True)
        expected.append(Chat(before, tokenizer.apply_chat_template([*each.turns, answer], tokenize=False)))
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
    ("template", "kind", "words"),
    [
        ("{{ 'x' * 9999999999 }}", RequestError, "d.jsonl: row 0: .*MemoryError"),
        pytest.param("{{ 'x' * 99999999 }}", CheckpointError, "makes 200,.* bytes of one chat", marks=pytest.mark.slow),
        ("{{ raise_exception('roles must\nalternate') }}", RequestError, r"row 0: .* \(roles must\)"),
        ("{% if %}", RequestError, "row 0: "),
        ("{{ messages[7].content }}", RequestError, "row 0: "),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, kind: type[CompresskitError], words: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(kind, match=words) as caught:
        rendered(INSTRUCTIONS, tokenizer)
    assert len(str(caught.value).splitlines()) == 1
