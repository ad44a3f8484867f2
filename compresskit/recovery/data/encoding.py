"""Encode instructions as tokens, with the model's chat template or Alpaca's prompt.

A sample ends with the template's end-of-turn tokens or the end-of-text token, so that a model learns to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.errors import RequestError
from compresskit.models.tokenizer import open_tokenizer, tokenizing
from compresskit.recovery.data.instructions import Instruction, Reading
from compresskit.recovery.data.rendering import Chat, rendered

ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{asked}\n\n### Response:\n"
)
"""The prompt of the Alpaca models (github.com/tatsu-lab/stanford_alpaca)."""
REFUSED = "not taken by the chat template"
OPEN_ENDINGS = (",", "(", "[", "{", " -", ":")
"""Endings of a truncated response."""


@dataclass(frozen=True)
class Sample:
    """One sample as tokens. Position t belongs to the response if t >= response_start."""

    instruction: Instruction
    tokens: list[int]
    response_start: int

    @property
    def response_tokens(self) -> int:
        """Number of tokens in the response."""
        return len(self.tokens) - self.response_start


def check_same_tokenizer(folder: Path, original: Path, trust_remote_code: bool = False) -> None:
    """Raise RequestError if two checkpoints have different tokenizers."""
    ours, theirs = (open_tokenizer(each, trust_remote_code) for each in (folder, original))
    if ours.get_vocab() != theirs.get_vocab():
        raise RequestError(
            f"--original {original}: has another tokenizer than {folder}; give the model that {folder} was made from"
        )


def is_truncated(response: str) -> bool:
    """Whether a response is truncated: it has an unclosed code fence, or its ending expects a continuation."""
    return response.count("```") % 2 == 1 or response.endswith(OPEN_ENDINGS)


def encode_samples(reading: Reading, tokenizer: Any, sequence_length: int) -> list[Sample]:
    """Encode all samples; drops truncated ones and those above `sequence_length` tokens, counted in `reading.dropped`.

    Returns:
        The tokens of the others, in their order.

    Raises:
        RequestError: no sample is left.
    """
    whole = [instruction for instruction in reading.samples if not is_truncated(instruction.response)]
    encoded = encode(whole, tokenizer, reading)
    samples = [sample for sample in encoded if len(sample.tokens) <= sequence_length]
    cut, long = len(reading.samples) - len(whole), len(encoded) - len(samples)
    reading.dropped |= {"truncated": cut, "too long": long}
    if not samples:
        others = "".join(f"; {complaint}" for complaint in reading.complaints())
        remedy = "mend the rows or chat_template" if REFUSED in reading.dropped else "raise --sequence-length, or give other data"
        raise RequestError(
            f"--data: of {len(reading.samples)} samples {long} are longer than {sequence_length} tokens and {cut} are cut off, "
            f"none is left{others}; {remedy}"
        )
    return samples


def encode(instructions: Sequence[Instruction], tokenizer: Any, reading: Reading) -> list[Sample]:
    """Encode samples and find the start of each response.

    Returns:
        The tokens, in order, without samples that the chat template does not take; those are counted in `reading.dropped`.

    Raises:
        CheckpointError: the tokenizer fails, or the template takes too much time or memory.
    """
    chats = rendered(instructions, tokenizer) if _has_template(tokenizer) else [_without_template(i) for i in instructions]
    samples = []
    with tokenizing(Path(tokenizer.name_or_path)):
        for instruction, chat in zip(instructions, chats, strict=True):
            if isinstance(chat, str):
                reading.drop(REFUSED, instruction.file, instruction.row, chat)
                continue
            samples.append(_encoded(instruction, chat, tokenizer))
            reading.systems_moved += chat is not None and chat.system_moved
    return samples


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _without_template(instruction: Instruction) -> str | None:
    """Why a sample cannot be written as Alpaca's prompt, if it cannot."""
    return "there is none, and tools are called" if instruction.uses_tools else None


def _encoded(instruction: Instruction, chat: Chat | None, tokenizer: Any) -> Sample:
    if chat is not None:
        before, whole = chat.before, chat.whole
        # Some templates open the turn otherwise than they write the answer (thinking marks): then no common prefix exists.
        after = whole.removeprefix(before).rstrip("\n") if whole.startswith(before) else instruction.response
        prompt = tokenizer(before, add_special_tokens=False, verbose=False)["input_ids"]
        response = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"]
        ended = whole.startswith(before)
    else:
        prompt = tokenizer(ALPACA_PROMPT.format(asked=_said(instruction.turns)), verbose=False)["input_ids"]
        end = getattr(tokenizer, "eos_token_id", None)
        prompt = prompt[:-1] if end is not None and len(prompt) > 1 and prompt[-1] == end else prompt
        response = tokenizer(instruction.response, add_special_tokens=False, verbose=False)["input_ids"]
        ended = False
    if not ended and tokenizer.eos_token_id is not None:
        response = [*response, tokenizer.eos_token_id]
    return Sample(instruction, [*prompt, *response], len(prompt))


def _said(turns: Sequence[dict[str, str]]) -> str:
    """Join all turns into one text; a single question is unchanged."""
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(turn["content"] if turn["role"] == "system" else f"{turn['role']}: {turn['content']}" for turn in turns)
