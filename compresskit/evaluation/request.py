"""What `evaluate` is asked for: its options, the checks that need no weights, and what scoring needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from compresskit import calibration
from compresskit.errors import RequestError
from compresskit.evaluation.prompts import ANSWER_TOKENS, PROMPTS
from compresskit.evaluation.scores import check_comparable, check_context
from compresskit.models.model import Model
from compresskit.walk.cost import embedding_bytes, head_share, hidden_bytes, walk_bytes

CHUNK_BYTES = 1 << 25
"""Bound on the float32 logits of a model, and on each temporary made from them (32 MiB): 170 positions at 49,152 tokens of
vocabulary."""
SCORING_CHUNKS = 6
"""Logits of two models and what is made of them, each as large as scoring bounds it."""
ANSWERED_COST = 5
"""Tokens that a pass reads in the time of one token of an answer, its share of the question included: 4.6 for SmolLM2-135M."""
LOADED_BYTES = 4
"""Of a weight of a model that is loaded whole on the CPU."""


class EvaluateOptions(BaseModel):
    """What to measure, on which text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    against: str | None = None
    """Model to compare with: a folder, a Hub id, or demo:smollm2-135m."""
    adapter: str | None = None
    """PEFT LoRA adapter to add; default: the one in SOURCE's folder adapter; none for no adapter."""
    data: str = "builtin"
    """Text: FILE.txt, .jsonl or .parquet, hub:DATASET, or builtin (never used for calibration)."""
    windows: Annotated[int, Field(ge=1)] = 20
    """Number of windows to score, from the start of the text."""
    sequence_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per window."""
    bos: Literal["auto", "always", "never"] = "auto"
    """Start token before every window; auto as the model's tokenizer does it with a text."""
    speed: bool = False
    """Measure prefill and decode tokens per second and peak memory; loads the models whole."""
    generations: Annotated[int, Field(ge=0, le=len(PROMPTS))] = 0
    """Number of questions that the models answer, to be read side by side; loads each model whole. 0 asks none."""
    tasks: str | None = None
    """Tasks to score, such as arc_easy,lambada: files of --tasks-folder, else tasks of lm-eval."""
    tasks_folder: str | None = None
    """Folder of NAME.jsonl files with question, choices, answer; or text, whose last word is predicted."""
    limit: Annotated[int | None, Field(ge=1)] = None
    """Maximum number of rows per task."""
    few_shot: Annotated[int, Field(ge=0)] = 0
    """Solved examples of the same task before each question."""
    gate: tuple[str, ...] = ()
    """Limit such as 'perplexity_ratio<=1.2'; may be repeated. Exit code 3 if one fails."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the accelerator where there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision; auto is float32 on the CPU, the checkpoint's own elsewhere."""
    verify: bool = True
    """Compare weight files with the SHA-256 in their manifest."""
    trust_remote_code: bool = False
    """Run code that the checkpoint ships."""


@dataclass(frozen=True)
class EvaluateRequest:
    """A request to measure a model, alone or beside the one it was made from."""

    model: Model
    reference: Model | None
    options: EvaluateOptions

    fixed_seconds: ClassVar[float] = 5.0
    """Imports and files: what a run takes whatever its size."""
    left_bytes: ClassVar[int] = 0
    """What stays in the process for the steps after it."""

    def check(self) -> None:
        """Refuse, before any work, models that cannot be compared and text that cannot judge them.

        Raises:
            RequestError: vocabularies differ, a context is too short, or the text would come from the model itself.
            CalibrationError: the text is unusable.
        """
        for each in (self.model, self.reference) if self.reference else (self.model,):
            check_context(each, self.options.sequence_length)
        if self.reference is not None:
            check_comparable(self.model, self.reference)
        check_evaluation_text("--data", self.options.data, self.options.sequence_length)

    def passes(self) -> float:
        """Forward passes of one window through all blocks."""
        models = 2.0 if self.options.against else 1.0
        answered = self.options.generations * ANSWER_TOKENS * ANSWERED_COST / self.options.sequence_length
        return (self.options.windows + answered) * models * (1 + head_share(self.model))

    def peak_bytes(self) -> int:
        """Peak bytes, on top of the process as it is."""
        tokens = self.options.windows, self.options.sequence_length
        whole = self.model.parameters * LOADED_BYTES if self.options.generations else 0
        return max(walk_bytes(self.model, tokens, 0), scoring_bytes(self.model, tokens[0] * tokens[1]), whole)


def scoring_bytes(model: Model, tokens: int) -> int:
    """Two models' last hidden states of so many tokens, embeddings and logits."""
    return 2 * (hidden_bytes(model, tokens) + embedding_bytes(model)) + SCORING_CHUNKS * CHUNK_BYTES


def check_evaluation_text(flag: str, data: str, sequence_length: int) -> None:
    """Refuse, before any work, text that cannot judge a model.

    Raises:
        RequestError: it would be sampled from the model itself.
        CalibrationError: unknown kind, unusable file, a missing package, certainly too little text.
    """
    parts = calibration.parse(data, flag)
    if any(isinstance(part, calibration.SelfSource) for part in parts):
        raise RequestError(f"{flag} {data}: a model's own text cannot judge it; give a file, hub:DATASET or builtin")
    calibration.check(data, len(parts), sequence_length, flag)


def read_evaluation_text(data: str) -> tuple[str, str]:
    """(text, sentence about what it is); `builtin` is the part that calibration never takes."""
    parts = [calibration.read_text(each, purpose="evaluation") for each in calibration.parse(data)]  # type: ignore[arg-type]
    return "\n\n".join(part.text for part in parts), " + ".join(part.description for part in parts)
