"""Render chats with a tokenizer's chat template in a process of its own, bounded in time and memory.

A template is a program that comes with the model. The sandbox in which transformers runs it keeps it from files and modules,
not from loops without end. The forked process needs no second tokenizer and can be killed from any thread; systems
without fork render in this process, unbounded.

A template that takes no system turn, or leaves it out, gets its text before the first question, where Gemma 3's own template
puts it. One that shows no text of a plain turn gets parts, `[{"type": "text", ...}]`.
"""

from __future__ import annotations

import itertools
import json
import os
import select
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from compresskit.checkpoint.small_files import first_line
from compresskit.errors import CheckpointError
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.data.turns import Turn, Turns

SECONDS = 10.0
"""For one chat; templates in use take less than a millisecond."""
SECONDS_EACH = 0.05
"""More for all chats together, each."""
MEMORY_BYTES = 1 << 30
"""What the process may take beyond what this one has."""
LARGEST_BYTES = 1 << 26
"""Of one chat's rendered texts."""
LENGTH_BYTES = 8
STATM = Path("/proc/self/statm")
PROBE = "plainly"
"""A word that no template writes by itself."""
END_OF_THOUGHT = "</think>"


class Chat(NamedTuple):
    """A chat as text."""

    before: str
    """Up to the response, which it opens."""
    whole: str
    system_moved: bool = False
    """Whether the system turn's text went into the first question."""


def rendered(instructions: Sequence[Instruction], tokenizer: Any) -> list[Chat | str]:
    """Render all chats.

    Returns:
        One for each instruction, in order; for a chat that the template does not take, the reason.

    Raises:
        CheckpointError: the template takes too much time or memory.
    """
    if not hasattr(os, "fork"):
        parts = _takes_parts(tokenizer)
        return [_checked(_answer(each, tokenizer, parts), each) for each in instructions]
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child uses none of their locks
        child = os.fork()
    if child == 0:
        _render(instructions, tokenizer, writing)
    os.close(writing)
    limit = time.monotonic() + 2 * SECONDS + SECONDS_EACH * len(instructions)
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            _received(pipe.fileno(), limit, tokenizer)  # the template has been tried
            return [_checked(_received(pipe.fileno(), limit, tokenizer), each) for each in instructions]
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _takes_parts(tokenizer: Any) -> bool:
    """Whether the template shows the text of a turn only where it is given as parts, as those of some vision models do."""
    shows = []
    for content in (PROBE, [{"type": "text", "text": PROBE}]):
        try:
            shows.append(PROBE in tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
        except Exception:  # what it raises is said of each chat
            shows.append(False)
    return shows == [False, True]


def _answer(instruction: Instruction, tokenizer: Any, parts: bool) -> list[str]:
    """[before, whole] of a chat, with a third text if its system turn was moved; or [reason] if the template does not take it."""
    reasons = []
    for turns, moved in _forms([*instruction.turns, instruction.message]):
        try:
            texts = _texts(turns, instruction, tokenizer, parts)
            reasons.append(_left_out(turns, texts[1], instruction, tokenizer, parts))
        except Exception as error:  # a template may raise whatever it calls raises
            reasons.append(first_line(error))
        if not reasons[-1]:
            return [*texts, "moved"] if moved else texts
    return reasons[:1]


def _forms(turns: Turns) -> Iterator[tuple[Turns, bool]]:
    """The forms in which a template may take a chat, the usual one first, and whether its system turn was moved."""
    forms = [turns]
    if any("tool_calls" in turn for turn in turns):
        forms.append([_with_text_arguments(turn) for turn in turns])  # DeepSeek's templates join them to other texts
    yield from ((form, False) for form in forms)
    if turns[0]["role"] == "system" and turns[1]["role"] == "user":
        for system, question, *rest in forms:
            asked = "\n\n".join(part for part in (system["content"].strip(), question["content"]) if part)
            yield [question | {"content": asked}, *rest], True


def _with_text_arguments(turn: Turn) -> Turn:
    if "tool_calls" not in turn:
        return turn
    functions = [call["function"] for call in turn["tool_calls"]]
    texts = [each | {"arguments": json.dumps(each["arguments"], ensure_ascii=False)} for each in functions]
    return turn | {"tool_calls": [call | {"function": each} for call, each in zip(turn["tool_calls"], texts, strict=True)]}


def _texts(turns: Turns, instruction: Instruction, tokenizer: Any, parts: bool) -> list[str]:
    """What stands before the last turn, and the whole chat."""
    before = _applied(turns[:-1], instruction, tokenizer, parts, opened=True)
    whole = _applied(turns, instruction, tokenizer, parts)
    if not whole.startswith(before):  # it opens an answer with the mark of a thought, and writes one without
        common = next((i for i, (ours, theirs) in enumerate(zip(before, whole, strict=False)) if ours != theirs), len(whole))
        closed = _applied(turns[:-1], instruction, tokenizer, parts)
        before = before[:common] if common >= len(closed) else before
    return [before, whole]


def _applied(turns: Turns, instruction: Instruction, tokenizer: Any, parts: bool, opened: bool = False) -> str:
    """The text of turns, with the begin of an answer where it is `opened`."""
    if parts:
        turns = [turn | {"content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    more: dict[str, Any] = {"tools": instruction.tools} if instruction.tools else {}
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened, **more)
    return text


def _left_out(turns: Turns, whole: str, instruction: Instruction, tokenizer: Any, parts: bool) -> str:
    """What the template leaves out in silence, system turns or calls; "" if nothing."""
    if turns[0]["role"] == "system" and turns[0]["content"].strip() not in whole:
        return "it leaves the system turn out"
    if not any("tool_calls" in turn for turn in turns):
        return ""
    silent = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
    try:
        same = _applied(silent, instruction, tokenizer, parts) == whole
    except Exception:  # it takes no such turn without calls, so it looks at them
        return ""
    return "it shows no tool calls" if same else ""


def _render(instructions: Sequence[Instruction], tokenizer: Any, writing: int) -> NoReturn:
    """Write the answers for all chats to a pipe and end this process, without what its parent does at its end."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory()
        with os.fdopen(writing, "wb") as pipe:
            parts = _takes_parts(tokenizer)
            for answer in itertools.chain([[]], (_answer(each, tokenizer, parts) for each in instructions)):
                data = json.dumps(answer).encode()
                pipe.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
                pipe.flush()
        status = 0
    finally:
        os._exit(status)


def _limit_memory() -> None:
    """Limit this process to `MEMORY_BYTES` more than it has, where the system says how much that is."""
    import resource

    if STATM.exists():
        most = int(STATM.read_text(encoding="ascii").split()[0]) * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _received(pipe: int, limit: float, tokenizer: Any) -> list[str]:
    """Read one answer; raises CheckpointError if it does not come in time, or is too large."""
    until = min(limit, time.monotonic() + SECONDS)
    size = int.from_bytes(b"".join(_read(pipe, LENGTH_BYTES, until, tokenizer)), "little")
    if size > LARGEST_BYTES:
        raise _too_much(tokenizer, f"makes {size:,} bytes of one chat")
    answer: list[str] = json.loads(b"".join(_read(pipe, size, until, tokenizer)))
    return answer


def _read(pipe: int, size: int, until: float, tokenizer: Any) -> Iterator[bytes]:
    while size:
        ready, _, _ = select.select([pipe], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            raise _too_much(tokenizer, f"takes more than {SECONDS:g} seconds for a chat")
        data = os.read(pipe, size)
        if not data:
            raise _too_much(tokenizer, f"takes more than {MEMORY_BYTES / 1e9:.1f} GB for a chat")
        size -= len(data)
        yield data


def _too_much(tokenizer: Any, what: str) -> CheckpointError:
    return CheckpointError(f"{tokenizer.name_or_path}: the chat template {what}; replace chat_template by the model's own")


def _checked(answer: list[str], instruction: Instruction) -> Chat | str:
    """The chat of an answer, or why it is not to be learned: templates leave out in silence what they do not know."""
    if len(answer) == 1:
        return answer[0]
    chat = Chat(answer[0], answer[1], len(answer) > 2)
    if instruction.response.rpartition(END_OF_THOUGHT)[2].strip() not in chat.whole:
        return "it does not show the answer"
    if instruction.beside and not chat.whole.startswith(chat.before):
        return "it writes the turns before the answer otherwise where one follows"
    return chat
