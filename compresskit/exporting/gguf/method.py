"""gguf: a model, or a LoRA adapter, as a GGUF file.

The format: docs/gguf.md of ggml. Names of tensors and keys, and the rounding of dense weights, are those of the package
`gguf`, which llama.cpp's own converter uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compresskit.exporting.method import ExportMethod
from compresskit.exporting.planned import PlannedFile, PlannedTensor
from compresskit.models.model import Model

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from compresskit.exporting.gguf.families import Settings
    from compresskit.exporting.gguf.vocabulary import Vocabulary

Type = Literal["auto", "f32", "f16", "bf16", "q8_0"]


class Gguf(ExportMethod, frozen=True):
    """One file for llama.cpp, Ollama and LM Studio."""

    ending: ClassVar[str] = ".gguf"
    magic: ClassVar[bytes] = b"GGUF"

    weights: Type = "auto"
    """Type of dense linears, and of low-bit ones that no block type holds; auto: as stored, q8_0 for the latter."""
    embedding: Type = "auto"
    """Type of the embedding and the head; auto: as stored."""
    pre: str | None = None
    """llama.cpp's name for how the tokenizer splits text, such as llama-bpe; found by itself for common ones."""
    tokenizer: bool = True
    """Write the tokenizer and the chat template."""

    def model_file(self, model: Model) -> PlannedFile:
        """Plan the file of a checkpoint."""
        from compresskit.exporting.gguf.families import architecture_of, family_of
        from compresskit.exporting.gguf.hyperparameters import configuration, settings
        from compresskit.exporting.gguf.tensors import Layout, tensors
        from compresskit.exporting.gguf.vocabulary import name_of_model, read_vocabulary, title

        family = family_of(model)
        config = configuration(model)
        layout = Layout(model, config, family, architecture_of(model), self.weights, self.embedding)
        found, notes = settings(model, config, family, layout.architecture, layout.widths)
        vocabulary = None
        if self.tokenizer:
            vocabulary, more = read_vocabulary(model.checkpoint.folder, model.vocabulary, self.pre)
            notes = notes + more
        planned = tensors(layout)
        name = name_of_model(title(model.checkpoint.folder), model.family, vocabulary.tokens if vocabulary else ())
        describe = partial(_describe, found, vocabulary, name, planned)
        return PlannedFile(layout.architecture, planned, describe, notes)

    def adapter_file(self, model: Model) -> PlannedFile:
        """Plan the file of an adapter."""
        from compresskit.exporting.gguf.adapter import adapter_file

        return adapter_file(model, self.weights)

    def write(self, planned: PlannedFile, path: Path, manifest: str, finished: Callable[[int], None]) -> dict[str, float]:
        """Write a planned file."""
        from compresskit.exporting.gguf import writing

        return writing.write(planned, path, manifest, finished)


def _describe(
    found: Settings, vocabulary: Vocabulary | None, name: str, planned: list[PlannedTensor], writer: GGUFWriter
) -> None:
    """Add the keys of a model."""
    from compresskit.exporting.gguf import writing

    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantization_version(writing.QUANTIZATION_VERSION)
    writer.add_file_type(writing.file_type(planned))
    writing.add_settings(writer, found)
    if vocabulary is None:
        writer.add_tokenizer_model("none")
    else:
        vocabulary.add_to(writer)
