"""Accuracy on tasks: find the likeliest continuation, block by block or through lm-eval.

For a prompt x and continuations y_c of t_c tokens and l_c characters:

    s_c = sum over t of log p(y_c,t | x, y_c,<t)                                                     (1)
    accuracy             share of rows whose right answer has the largest s_c                        (2)
    normalised accuracy  the same with s_c / l_c, as lm-eval's acc_norm                              (3)
    last word            share of rows whose every target token is the likeliest one (LAMBADA)       (4)

As in lm-eval, the tokens of y_c are the tokens of x y_c beyond those of x. Windows are padded on the right, where earlier
tokens cannot see the padding.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError, RequestError
from compresskit.evaluation.scores import context_length
from compresskit.evaluation.task_files import Task
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.models.tokenizer import check_vocabulary, open_tokenizer, tokenizing
from compresskit.walk.walk import Walk

LOGITS_BYTES = 1 << 28
"""Bound on the float32 logits of one micro-batch (256 MiB)."""
FLOAT32_BYTES = 4
TOKENS_OF_A_WALK = 1 << 16
"""Number of tokens whose hidden states are held at once."""
BATCH_ON_CPU = 8
"""Batch size of lm-eval on a CPU."""
LENGTH_STEP = 32
"""Windows are padded to a multiple of this, which limits the number of different lengths."""


class Continuation(NamedTuple):
    """Tokens of a prompt with one continuation."""

    ids: list[int]
    start: int
    """Position of the continuation's first token."""


class Likelihood(NamedTuple):
    """The model's prediction for one continuation."""

    log_probability: float
    """Equation 1, in nats."""
    likeliest: bool
    """Whether every token is the model's most probable one."""


def encoder(folder: Path, trust_remote_code: bool) -> Callable[[str, str], Continuation]:
    """Build function(prompt, continuation) -> Continuation; it adds the start token if the tokenizer sets one."""
    tokenizer = open_tokenizer(folder, trust_remote_code)
    with tokenizing(folder):
        probe = tokenizer("a").input_ids
    first = probe[:1] if probe and probe[0] == tokenizer.bos_token_id else []

    def encode(prompt: str, continuation: str) -> Continuation:
        with tokenizing(folder):
            whole = tokenizer(prompt + continuation, add_special_tokens=False).input_ids
            start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        if not whole:
            raise CheckpointError(f"{folder}: its tokenizer gives no token for {shown(prompt + continuation)}; restore its own")
        start = min(start, len(whole) - 1)  # if the last character merges with the continuation
        return Continuation(first + whole, max(1, len(first) + start))

    return encode


def likelihoods(
    model: Model, continuations: Sequence[Continuation], where: Where, on_done: Callable[[int, int], None]
) -> list[Likelihood]:
    """Score every continuation, in order; raises RequestError if one exceeds the model's context."""
    context = context_length(model)
    continuations = [_fitted(continuation, context) for continuation in continuations]
    order = sorted(range(len(continuations)), key=lambda index: len(continuations[index].ids))
    found: dict[int, Likelihood] = {}
    while len(found) < len(order):
        left = order[len(found) :]
        length = _padded(len(continuations[left[0]].ids))
        part = [index for index in left if len(continuations[index].ids) <= length][: max(1, TOKENS_OF_A_WALK // length)]
        found |= dict(zip(part, _walked(model, [continuations[i] for i in part], length, where), strict=True))
        on_done(len(found), len(order))
    return [found[index] for index in range(len(continuations))]


def _padded(length: int) -> int:
    return math.ceil(max(length, 2) / LENGTH_STEP) * LENGTH_STEP


def _fitted(continuation: Continuation, context: int | None) -> Continuation:
    """Keep the last tokens that fit into the model's context, and the start token."""
    surplus = len(continuation.ids) - (context or len(continuation.ids))
    if surplus <= 0:
        return continuation
    if continuation.start - surplus < 1:
        raise RequestError(
            f"a continuation of {len(continuation.ids) - continuation.start} tokens exceeds the context of {context} tokens"
        )
    return Continuation(continuation.ids[:1] + continuation.ids[1 + surplus :], continuation.start - surplus)


def _walked(model: Model, part: list[Continuation], length: int, where: Where) -> list[Likelihood]:
    context = context_length(model)
    length = min(length, context) if context else length
    tokens = torch.zeros(len(part), length, dtype=torch.int64)
    for row, continuation in enumerate(part):
        tokens[row, : len(continuation.ids)] = torch.tensor(continuation.ids)
    vocabulary = model.vocabulary
    size = max(1, LOGITS_BYTES // (length * vocabulary * FLOAT32_BYTES))
    walk = Walk(model, tokens, where, size, dealt=False)
    for _ in walk:
        pass
    rows = (logits for _, _, batch in walk.logits() for logits in batch)
    return [_likelihood(logits, continuation) for logits, continuation in zip(rows, part, strict=True)]


def _likelihood(logits: Tensor, continuation: Continuation) -> Likelihood:
    """Score a continuation from logits (length, vocabulary); the logits at position t predict the token after t."""
    targets = torch.tensor(continuation.ids[continuation.start :], device=logits.device)
    predicting = logits[continuation.start - 1 : len(continuation.ids) - 1].log_softmax(dim=-1)
    chosen = predicting.gather(1, targets[:, None])
    return Likelihood(float(chosen.double().sum()), bool((predicting.argmax(dim=-1) == targets).all()))


def score_tasks(
    model: Model, tasks: Sequence[Task], where: Where, on_done: Callable[[int, int], None]
) -> dict[str, dict[str, float]]:
    """Scores by task: "accuracy", "accuracy_normalised" (multiple choice only), "standard_error" and "rows"."""
    encode = encoder(model.checkpoint.folder, where.trust_remote_code)
    continuations = [encode(row.prompt, text) for task in tasks for row in task.rows for text in row.continuations]
    check_vocabulary(model, max((max(each.ids) for each in continuations), default=0))
    answers = iter(likelihoods(model, continuations, where, on_done))
    return {task.name: _scores(task, [[next(answers) for _ in row.continuations] for row in task.rows]) for task in tasks}


def _scores(task: Task, found: list[list[Likelihood]]) -> dict[str, float]:
    if not task.choices:
        hits = [float(each[0].likeliest) for each in found]
        return {"accuracy": statistics.fmean(hits), **_spread(hits)}
    plain, normalised = [], []
    for row, each in zip(task.rows, found, strict=True):
        sums = [likelihood.log_probability for likelihood in each]
        rates = [value / length for value, length in zip(sums, row.lengths, strict=True)]
        plain.append(float(sums.index(max(sums)) == row.answer))
        normalised.append(float(rates.index(max(rates)) == row.answer))
    both = {"accuracy": statistics.fmean(plain), "accuracy_normalised": statistics.fmean(normalised)}
    return {**both, **_spread(normalised)}


def _spread(hits: list[float]) -> dict[str, float]:
    """Standard error of a share over these rows."""
    error = statistics.stdev(hits) / math.sqrt(len(hits)) if len(hits) > 1 else 0.0
    return {"standard_error": error, "rows": len(hits)}


def main_score(scores: dict[str, float]) -> float:
    """The score for gates and tables: normalised accuracy if there is one."""
    return scores.get("accuracy_normalised", scores["accuracy"])


def lm_eval_scores(network: Any, tokenizer: Any, names: list[str], limit: int | None, shots: int) -> dict[str, dict[str, float]]:
    """Like `score_tasks`, through lm-eval, which downloads its tasks; raises RequestError if it or a task is missing."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RequestError(
            f"--tasks {','.join(names)}: takes lm-eval, pip install 'compresskit[tasks]'; or --tasks-folder with NAME.jsonl files"
        ) from error
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise RequestError(f"--tasks {unknown[0]}: lm-eval has no such task; see lm-eval ls tasks")
    # lm-eval's batch size search runs whole contexts: minutes on a CPU, where larger batches are not faster.
    batch = BATCH_ON_CPU if network.device.type == "cpu" else "auto"
    wrapped = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch)
    try:
        report = simple_evaluate(
            model=wrapped, tasks=names, limit=limit, num_fewshot=shots or None, task_manager=manager, bootstrap_iters=0
        )
    except IndexError as error:
        known, largest = network.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
        if largest < known:
            raise
        raise CheckpointError(
            f"{tokenizer.name_or_path}: its tokenizer gives tokens up to {largest}, the model knows {known}; restore its own "
            "tokenizer"
        ) from error
    return {name: _from_lm_eval(report["results"][name], report["n-samples"][name]["effective"]) for name in names}


def _from_lm_eval(found: dict[str, Any], rows: int) -> dict[str, float]:
    names = {"acc,none": "accuracy", "acc_norm,none": "accuracy_normalised", "exact_match,none": "accuracy"}
    scores = {ours: float(found[theirs]) for theirs, ours in names.items() if theirs in found}
    if not scores:
        raise RequestError(f"lm-eval reports {', '.join(found)} for this task, no accuracy; choose another task")
    return {"accuracy": next(iter(scores.values())), **scores, "rows": rows}
