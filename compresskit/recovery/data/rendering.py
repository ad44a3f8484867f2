"""Render chats with a tokenizer's chat template in a process of its own, bounded in time and memory.

A template is a program that comes with the model. The sandbox in which transformers runs it keeps it from files and modules,
not from loops without end. The forked process needs no second tokenizer and can be killed from any thread; systems
without fork render in this process, unbounded.
"""

from __future__ import annotations

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
from compresskit.errors import CheckpointError, RequestError
from compresskit.recovery.data.instructions import Instruction

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


class Chat(NamedTuple):
    """A chat as text."""

    before: str
    """Up to the response, which it opens."""
    whole: str


def rendered(instructions: Sequence[Instruction], tokenizer: Any) -> list[Chat]:
    """Render all chats.

    Returns:
        One for each instruction, in order.

    Raises:
        CheckpointError: the template takes too much time or memory.
        RequestError: the template does not take a chat; the message names its row.
    """
    if not hasattr(os, "fork"):
        return [_checked(_answer(each, tokenizer), each, tokenizer) for each in instructions]
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork beside threads: the child uses none of their locks
        child = os.fork()
    if child == 0:
        _render(instructions, tokenizer, writing)
    os.close(writing)
    limit = time.monotonic() + SECONDS + SECONDS_EACH * len(instructions)
    try:
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            return [_checked(_received(pipe.fileno(), limit, tokenizer), each, tokenizer) for each in instructions]
    finally:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _answer(instruction: Instruction, tokenizer: Any) -> list[str]:
    """[before, whole] of a chat, or [reason] if the template does not take it."""
    answer = {"role": "assistant", "content": instruction.response}
    try:
        before = tokenizer.apply_chat_template(instruction.turns, tokenize=False, add_generation_prompt=True)
        return [before, tokenizer.apply_chat_template([*instruction.turns, answer], tokenize=False)]
    except Exception as error:  # a template may raise whatever it calls raises
        return [first_line(error)]


def _render(instructions: Sequence[Instruction], tokenizer: Any, writing: int) -> NoReturn:
    """Write the answers for all chats to a pipe and end this process, without what its parent does at its end."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        _limit_memory()
        with os.fdopen(writing, "wb") as pipe:
            for each in instructions:
                data = json.dumps(_answer(each, tokenizer)).encode()
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


def _checked(answer: list[str], instruction: Instruction, tokenizer: Any) -> Chat:
    if len(answer) == 1:
        raise RequestError(
            f"{instruction.file}: row {instruction.row}: the chat template of {tokenizer.name_or_path} does not take it "
            f"({answer[0]}); mend the row, or replace chat_template"
        )
    return Chat(*answer)
