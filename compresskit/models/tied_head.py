"""Read a tied model that stores its one matrix under the name of the head as if it stored the embedding.

transformers ties in both directions on loading. What is written has the usual name, the embedding's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from compresskit.checkpoint.reader import Checkpoint, Stored
from compresskit.models.model import Model


def with_embedding(model: Model, trust_remote_code: bool = False) -> Model:
    """Give a tied model that stores a head and no embedding the embedding; any other is returned as it is.

    Returns:
        The model; its embedding is read from the head's tensor.

    Raises:
        CheckpointError: transformers does not take its configuration.
    """
    architecture, checkpoint = model.architecture, model.checkpoint
    embedding, head = (model.stored_name(f"{name}.weight") for name in (architecture.embedding, architecture.head))
    if embedding in checkpoint.tensors or head not in checkpoint.tensors or not _is_tied(checkpoint, trust_remote_code):
        return model
    tensors = {
        embedding if name == head else name: replace(spec, name=embedding) if name == head else spec
        for name, spec in checkpoint.tensors.items()
    }
    file_of = checkpoint.file_of | ({embedding: checkpoint.file_of[head]} if head in checkpoint.file_of else {})
    held, readers = (checkpoint.stored.tensors, checkpoint.stored.readers) if checkpoint.stored else (checkpoint.tensors, {})
    form = f"{checkpoint.stored.form}; " if checkpoint.stored else ""
    stored = Stored(f"{form}the embedding as {head}", held, {**readers, embedding: partial(checkpoint.read, head)})
    return replace(model, checkpoint=replace(checkpoint, tensors=tensors, file_of=file_of, stored=stored))


def _is_tied(checkpoint: Checkpoint, trust_remote_code: bool) -> bool:
    """Whether the configuration ties; the class's own default holds where config.json does not say."""
    from compresskit.models.network import configuration_of

    return bool(configuration_of(checkpoint, trust_remote_code).get_text_config().tie_word_embeddings)
