"""Numbers of tokens in config.json, generation_config.json and tokenizer_config.json: those there are, and the new ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from compresskit.checkpoint.small_files import shown
from compresskit.errors import UnsupportedArchitecture

ENDINGS = ("_token_id", "_token_ids", "_token_index", "_token_indices")
LISTS = ("suppress_tokens", "begin_suppress_tokens")
UNKNOWN = ("bad_words_ids", "sequence_bias", "forced_decoder_ids", "force_words_ids")
"""Keys of generation_config.json with tokens in forms of their own."""
BY_NUMBER = "added_tokens_decoder"
"""Key of tokenizer_config.json: added tokens by number, as text."""


def named_tokens(config: Mapping[str, Any], rows: int) -> set[int]:
    """Numbers of the tokens that a configuration names, at any depth, below `rows`."""
    found: set[int] = set()

    def seen(number: int) -> int:
        found.add(number)
        return number

    _visit(dict(config), seen)
    return {number for number in found if number < rows}


def renumbered(config: Mapping[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    """Give a configuration the new numbers; one that stands for no token (-1, or beyond the vocabulary) stays.

    Returns:
        The configuration.

    Raises:
        UnsupportedArchitecture: a key holds tokens in a form that is not known.
    """
    if key := next((key for key in UNKNOWN if config.get(key)), None):
        raise UnsupportedArchitecture(
            f"{key} is {shown(config[key])}: names tokens in a form that cannot be renumbered; remove it from "
            "generation_config.json"
        )
    found: dict[str, Any] = _visit(dict(config), lambda old: number.get(old, old))
    return found


def renumbered_tokens(config: Mapping[str, Any], number: Mapping[int, int]) -> dict[str, Any]:
    """tokenizer_config.json with its added tokens under their new numbers."""
    decoder = config.get(BY_NUMBER)
    if not isinstance(decoder, dict):
        return dict(config)
    known = {int(old): token for old, token in decoder.items() if str(old).isdecimal()}
    return {**config, BY_NUMBER: {str(number[old]): token for old, token in sorted(known.items()) if old in number}}


def _visit(part: Any, change: Callable[[int], int]) -> Any:
    """A configuration whose token numbers have gone through `change`."""
    if isinstance(part, list):
        return [_visit(each, change) for each in part]
    if not isinstance(part, dict):
        return part
    return {key: _changed(value, change) if _is_named(key) else _visit(value, change) for key, value in part.items()}


def _is_named(key: object) -> bool:
    return isinstance(key, str) and (key.endswith(ENDINGS) or key in LISTS)


def _changed(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, list):
        return [_changed(each, change) for each in value]
    return change(value) if type(value) is int and value >= 0 else value
