"""Answers of a model and of its original to the same questions, decoded greedily, to be read side by side.

Both get the same tokens: the chat template of the model's tokenizer around each question, or a plain frame where it has none.
At every step the most likely token is taken, so that the same weights on the same machine give the same text. Questions of
the same length run together, so that none needs padding.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import groupby, takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList

from compresskit.checkpoint.stock import quiet
from compresskit.errors import CheckpointError, NumericalError, RequestError
from compresskit.evaluation.memory import available_bytes
from compresskit.evaluation.prompts import ANSWER_TOKENS, PLAIN, PROMPTS
from compresskit.evaluation.scores import context_length
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.models.ragged import load_stock
from compresskit.models.tokenizer import check_vocabulary, open_tokenizer, tokenizing

MEMORY_MARGIN = 1.1
"""Required memory relative to the weights: one tensor during conversion, a short KV cache."""
Progress = Callable[[int, int], None]


class Asked(NamedTuple):
    """Questions, ready for the models."""

    questions: list[str]
    tokens: list[list[int]]
    """Token ids of each."""
    tokenizer: Any
    answer_tokens: int
    """Tokens of an answer, at most."""


def ask(models: list[Model], count: int, where: Where) -> Asked:
    """Make the first `count` questions ready for the models, before any work.

    `models`: the model, and the original if there is one. They are loaded whole, one after the other.

    Returns:
        The questions, their tokens around them, and how long an answer may be.

    Raises:
        RequestError: a model does not fit into memory, or no answer fits into a context.
        CheckpointError: the model has no usable tokenizer, or its chat template leaves questions out.
    """
    _check_memory(models, where)
    folder = models[0].checkpoint.folder
    tokenizer = open_tokenizer(folder, where.trust_remote_code)
    questions = list(PROMPTS[:count])
    with tokenizing(folder):
        tokens = [_encoded(tokenizer, question) for question in questions]
    if not all(tokens):
        raise CheckpointError(f"{folder}: its chat template makes nothing of a question; replace it by the model's own")
    check_vocabulary(models[0], max(map(max, tokens)))
    contexts = [length for length in map(context_length, models) if length is not None]
    room = min([ANSWER_TOKENS, *(length - max(map(len, tokens)) for length in contexts)])
    if room < 1:
        raise RequestError(
            f"{folder}: a question takes {max(map(len, tokens))} tokens with its chat template, its context is {min(contexts)}; "
            "leave --generations out"
        )
    return Asked(questions, tokens, tokenizer, room)


def _encoded(tokenizer: Any, question: str) -> list[int]:
    """Token ids of one question, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer(PLAIN.format(prompt=question)).input_ids)
    turns = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"])


def _check_memory(models: list[Model], where: Where) -> None:
    needed = MEMORY_MARGIN * max(model.parameters for model in models) * where.dtype.itemsize
    available = available_bytes(where.device)
    if available is not None and needed > available:
        raise RequestError(
            f"{models[0].checkpoint.folder}: --generations loads whole models, about {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are free on {where.device}; leave --generations out, or pass --dtype bfloat16"
        )


def generations(
    models: list[Model], asked: Asked, where: Where, progress: Progress = lambda done, total: None
) -> list[dict[str, str | None]]:
    """Let each model answer every question.

    Returns:
        For every question its "prompt", the original's answer "before" (None without an original), the model's "after".

    Raises:
        NumericalError: a model computes NaN.
        RequestError: the model has an adapter, but peft is not installed.
    """
    total = len(models) * len(asked.questions)
    answers: list[dict[int, str]] = [{} for _ in models]
    for model, found in zip(models, answers, strict=True):
        network = load_stock(model, where)
        for index, answer in _answers(network, asked):
            found[index] = answer
            progress(sum(map(len, answers)), total)
        del network
        gc.collect()  # the next model is not loaded beside this one
    befores = answers[1] if len(answers) > 1 else {}
    return [
        {"prompt": question, "before": befores.get(index), "after": answers[0][index]}
        for index, question in enumerate(asked.questions)
    ]


def _answers(network: Any, asked: Asked) -> Iterator[tuple[int, str]]:
    """The network's answers, each with the number of its question."""
    ends = end_tokens(network, asked.tokenizer)
    device = next(network.parameters()).device

    def length(index: int) -> int:
        return len(asked.tokens[index])

    for _, group in groupby(sorted(range(len(asked.tokens)), key=length), key=length):
        indices = list(group)
        prompts = torch.tensor([asked.tokens[index] for index in indices], device=device)
        for index, ids in zip(indices, greedy(network, prompts, asked.answer_tokens, ends), strict=True):
            yield index, asked.tokenizer.decode(ids, skip_special_tokens=True).strip()


def end_tokens(network: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, by the generation's configuration and by the tokenizer."""
    configured = getattr(getattr(network, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return {each for each in (*listed, tokenizer.eos_token_id) if type(each) is int}


def greedy(network: Any, prompts: Tensor, most: int, ends: set[int]) -> list[list[int]]:
    """Continue prompts (rows, length) int64 by the most likely token, up to `most` times, by transformers' own `generate`.

    The folder's generation settings do not hold: a penalty or a temperature would hide what compression changed.

    Returns:
        The new tokens of every row, without the end token and what follows it.

    Raises:
        NumericalError: a logit is NaN.
    """
    fill = int(prompts[0, 0])  # what a row that has ended is fed: a token that the model surely has
    network.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=sorted(ends) or None, pad_token_id=fill
    )
    checked = LogitsProcessorList([_finite])
    with quiet():
        made = network.generate(prompts, attention_mask=torch.ones_like(prompts), logits_processor=checked)
    rows = made[:, prompts.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in rows]


def _finite(tokens: Tensor, logits: Tensor) -> Tensor:
    """The logits (rows, vocabulary) as they are; raises NumericalError unless they are numbers."""
    if bool(logits.isnan().any()):
        raise NumericalError("generating: the model's logits hold NaN; use --dtype float32")
    return logits
