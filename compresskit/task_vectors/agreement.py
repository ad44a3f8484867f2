"""Whether the sources of a merge belong to one model: the result has the configuration and the tokenizer of the first.

A weight means something only under the configuration that it was trained with: rotary bases, epsilons, activations, scalings.
A row of an embedding means something only for the token of its id. Sources that differ in these are refused. What concerns
training alone is not compared; what a user may set at will (lengths, special tokens) is said in a note.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.small_files import read_bytes, read_json, shown
from compresskit.errors import CheckpointError, RequestError
from compresskit.formats.peft import CONFIG
from compresskit.task_vectors.vector import PlainVector, TaskVector, adapter_config

NOT_COMPUTED = {
    "_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map",
    "initializer_range", "id2label", "label2id", "num_labels", "problem_type", "gradient_checkpointing", "output_router_logits",
    "router_aux_loss_coef", "tokenizer_class", "attn_implementation", "_attn_implementation", "quantization_config",
    "pretraining_tp", "return_dict", "task_specific_params",
}  # fmt: skip
"""Keys of config.json that change no output of a trained model."""
TRAINED_WITH = ("dropout", "pdrop", "_drop")
"""How the names of keys end that matter in training alone."""
AT_WILL = {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"}
"""Keys that change how a model is used, not what its weights mean."""
TOKENIZER, VOCABULARY, PIECES = "tokenizer.json", "vocab.json", "tokenizer.model"
SHOWN = 3
"""Names in a note."""


def notes_on_agreement(vectors: list[TaskVector]) -> list[str]:
    """Compare the configurations and tokenizers of all sources with those of the first.

    Returns:
        What differs and may: the result takes it from the first.

    Raises:
        RequestError: two sources compute otherwise, or give an id to different tokens.
        CheckpointError: a configuration or a tokenizer is damaged.
    """
    found = []
    for vector in vectors[1:]:
        if vector.is_adapter:
            found += _of_adapters(vectors[0], vector)
        else:
            found += _of_configurations(vectors[0], vector)
            found += _of_tokenizers(vectors[0].folder, vector.folder)
    return found


def _of_adapters(first: TaskVector, vector: TaskVector) -> list[str]:
    names = [adapter_config(each).get("base_model_name_or_path") for each in (vector, first)]
    if names[0] == names[1] or not all(names):
        return []
    what = f"is of the base {shown(names[0])}, {first.folder} of {shown(names[1])}"
    return [f"{vector.folder / CONFIG}: {what}, which the result names; they must be one model"]


def _of_configurations(first: TaskVector, vector: TaskVector) -> list[str]:
    raw = _raw(vector), _raw(first)
    if not list(_differences(*raw)):
        return []
    ours, theirs = (_complete(each, config) for each, config in zip((vector, first), raw, strict=True))
    noted = []
    for key, mine, other in _differences(ours, theirs):
        what = f"{key} is {shown(mine)}, but {shown(other)} in {first.folder}"
        if key.rpartition(".")[2] not in AT_WILL:
            raise RequestError(
                f"{vector.folder / 'config.json'}: {what}, so that their weights mean different things; merge checkpoints of one "
                "configuration"
            )
        noted.append(f"{vector.folder / 'config.json'}: {what}, which the result keeps")
    return noted


def _raw(vector: TaskVector) -> dict[str, Any]:
    return vector.store.config if isinstance(vector, PlainVector) else read_json(vector.folder / "config.json")


def _complete(vector: TaskVector, raw: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the values that its class gives to keys left out; as it is where transformers has no class."""
    from compresskit.models.network import configuration_of

    try:
        found: dict[str, Any] = configuration_of(Checkpoint(vector.folder, raw, {}, {})).to_dict()
    except CheckpointError:
        return raw  # a model that brings its own code: what is written is compared
    return found


def _differences(mine: dict[str, Any], other: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Keys that change what is computed and whose values differ, with both values; keys of inner sections with a dot."""
    for key in dict.fromkeys([*other, *mine]):
        if key in NOT_COMPUTED or str(key).endswith(TRAINED_WITH):
            continue
        values = mine.get(key), other.get(key)
        if isinstance(values[0], dict) and isinstance(values[1], dict):
            yield from _differences(values[0], values[1], f"{path}{key}.")
        elif values[0] != values[1]:
            yield f"{path}{key}", *values


def _of_tokenizers(first: Path, folder: Path) -> list[str]:
    files = folder / TOKENIZER, first / TOKENIZER
    if all(file.is_file() for file in files) and read_bytes(files[0]) == read_bytes(files[1]):
        return []
    mine, other = token_ids(folder), token_ids(first)
    if mine is None or other is None:
        pieces = [path for path in (folder / PIECES, first / PIECES) if path.is_file()]
        differ = len(pieces) == len((folder, first)) and read_bytes(pieces[0]) != read_bytes(pieces[1])
        return (
            [f"{pieces[0]}: is not that of {first}, which the result keeps; they must number their tokens alike"]
            if differ
            else []
        )
    token_of = {number: token for token, number in other.items()}
    for token, number in sorted(mine.items(), key=lambda item: item[1]):
        there = other.get(token)
        if (there is not None and there != number) or token_of.get(number, token) != token:
            known = f"{shown(token_of[number])} in {first}" if number in token_of else f"{first} has it as {there}"
            what = f"token {number} is {shown(token)}, but {known}"
            raise RequestError(f"{folder}: its tokenizer's {what}; merge checkpoints of one tokenizer")
    more = sorted(mine.keys() - other.keys())
    if not more:
        return []
    what = f"{len(more)} tokens of its tokenizer, such as {', '.join(shown(token) for token in more[:SHOWN])}"
    return [f"{folder}: {what}, are not in that of {first}, which the result keeps"]


def token_ids(folder: Path) -> dict[str, int] | None:
    """Read the ids of a tokenizer's tokens.

    Returns:
        Ids by token, or None where no file says them as JSON.

    Raises:
        CheckpointError: a file holds no such table.
    """
    for name in (TOKENIZER, VOCABULARY):
        path = folder / name
        if not path.is_file():
            continue
        content = read_json(path)
        found = _ids(content) if name == TOKENIZER else content
        if not isinstance(found, dict) or not all(type(number) is int for number in found.values()):
            raise CheckpointError(f"{path}: holds no table of tokens and their ids; restore the file from its source")
        return found
    return None


def _ids(content: dict[str, Any]) -> Any:
    """The table in a tokenizer.json; None if there is none."""
    model, added = content.get("model"), content.get("added_tokens") or []
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    try:
        if isinstance(vocabulary, list):  # Unigram: pieces with their scores, in the order of their ids
            vocabulary = {piece[0]: number for number, piece in enumerate(vocabulary)}
        return {**(vocabulary or {}), **{token["content"]: token["id"] for token in added}}
    except (TypeError, KeyError, IndexError):
        return None
