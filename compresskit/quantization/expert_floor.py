"""Second moments of experts that few calibration tokens reach, filled up with those of the block.

A linear with n inputs needs at least n tokens for second moments of full rank. Of an expert with fewer, the missing ones are
tokens of the whole block, each with the same weight:

    H_e = sum over t in e of x_t x_t^T + w sum over t of x_t x_t^T ,    w = min(1, (n - N_e) / N)          (1)

symbol  meaning                                                              shape       name here
x_t     input of the expert's linear at token t, whoever the token goes to   (n,)
N_e     tokens that the router sends to the expert                                       tokens
N       tokens of the block                                                              all_tokens
n       inputs of the linear: the floor

The inputs of gate and up are the router's, the same for all experts. Those of the output projection are what the expert would
have made of every token, with its gate and up as they are quantised by then. A token of another expert never counts more than
one of its own. An expert that no token reaches has the block's moments alone. Sums and counts are of all ranks.

No paper; GPTQ's released code and its ports damp what is missing, or round such experts to nearest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from compresskit.models.architectures import DOWN
from compresskit.models.experts import PlainExperts
from compresskit.models.model import EXPERT_NUMBER
from compresskit.walk.block import Block
from compresskit.walk.statistics import Gram

NAMED = 8
"""Experts that a note names; the manifest has all."""


class ExpertFloor:
    """The experts of one block: their tokens, and what fills up their second moments. A dense block has none."""

    def __init__(self, block: Block):
        self.block = block
        self.path, self.experts = _experts_of(block)
        self.tokens: dict[int, int] = {}
        """By expert."""
        self.filled: set[int] = set()
        """Experts of which a linear has fewer tokens than inputs."""
        self.inputs: Gram | None = None
        """Of the router's inputs, while a position is collected that reads them."""
        self.outputs: dict[int, Gram] = {}
        """Of the inputs of output projections at all tokens, by expert, while theirs is collected."""

    @contextmanager
    def watching(self, groups: Sequence[tuple[str, ...]]) -> Iterator[None]:
        """Collect in a context what may fill up the second moments of these groups' inputs."""
        self.inputs, self.outputs = None, {}
        for group in groups:
            number, linear = self._number(group[0]), self.block.linear(group[0])
            if number is None:
                continue
            if not group[0].endswith(f".{DOWN}"):
                self.inputs = self.inputs or Gram(linear.in_features, linear.weight.device)
            elif self.tokens.get(number, 0) < linear.in_features:
                self.outputs[number] = Gram(linear.in_features, linear.weight.device)
        if self.experts is None or (self.inputs is None and not self.outputs):
            yield
            return
        handle = self.experts.register_forward_pre_hook(self._see, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add a micro-batch, whatever expert its tokens go to."""
        assert self.experts is not None
        hidden: Tensor = self.experts.arguments(args, kwargs)[0]
        if self.inputs is not None:
            self.inputs.add(hidden)
        for number, gram in self.outputs.items():
            gram.add(self.experts.inner(number, hidden))

    def fill(self, grams: Mapping[str, Gram]) -> None:
        """Equation 1, in place. `grams`: by the first linear of each group, sums of all ranks that nothing has read yet."""
        for each in (*([self.inputs] if self.inputs else []), *self.outputs.values()):
            each.share()
        for name, gram in grams.items():
            number = self._number(name)
            if number is None:
                continue
            added = self.outputs.pop(number, None) if name.endswith(f".{DOWN}") else self.inputs
            self.tokens.setdefault(number, gram.tokens)
            missing = len(gram.sum) - gram.tokens
            if added is not None and added.tokens and missing > 0:
                self.filled.add(number)
                _add(gram, added, min(added.tokens, missing))
        self.inputs, self.outputs = None, {}

    def facts(self) -> dict[str, Any]:
        """What the manifest says of the block, nothing of a dense one: tokens by expert, and numbers of those filled up."""
        if not self.tokens:
            return {}
        return {
            "tokens_by_expert": [self.tokens[number] for number in sorted(self.tokens)],
            "filled_experts": sorted(self.filled),
        }

    def _number(self, name: str) -> int | None:
        """The number of the expert that a linear belongs to; None of any other."""
        match = EXPERT_NUMBER.search(name)
        return int(match[1]) if match and self.experts is not None and name.startswith(f"{self.path}.") else None


def _experts_of(block: Block) -> tuple[str, PlainExperts | None]:
    """(plain path, module) of a block's experts."""
    for path, module in block.module.named_modules(prefix=block.name):
        if isinstance(module, PlainExperts):
            return path, module
    return "", None


def _add(gram: Gram, added: Gram, tokens: int) -> None:
    """Add so many tokens' worth of other second moments."""
    weight = tokens / added.tokens
    gram.lower.add_(added.lower, alpha=weight)
    gram.sum.add_(added.sum, alpha=weight)
    gram.tokens += tokens


def summary(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's result says of the experts, from the facts of its blocks; nothing of a dense model.

    Returns:
        Under `expert_tokens` the fewest, the median and the most tokens of an expert, under `filled_experts` how many were filled
        up, and of those a note.
    """
    found = {index: block for index, block in enumerate(blocks) if block.get("tokens_by_expert")}
    if not found:
        return {}
    tokens = sorted(count for block in found.values() for count in block["tokens_by_expert"])
    few = [
        f"block {index} expert {number} ({block['tokens_by_expert'][number]})"
        for index, block in found.items()
        for number in block["filled_experts"]
    ]
    counts = {"fewest": tokens[0], "median": tokens[math.floor(len(tokens) / 2)], "most": tokens[-1]}
    result: dict[str, Any] = {"expert_tokens": counts, "filled_experts": len(few)}
    if few:
        shown = ", ".join(few[:NAMED]) + (f" and {len(few) - NAMED} more" if len(few) > NAMED else "")
        result["notes"] = [
            f"{len(few)} of {len(tokens)} experts have fewer calibration tokens than a linear of theirs has inputs, and are "
            f"rounded by the tokens of their block too: {shown}; pass more --samples"
        ]
    return result
