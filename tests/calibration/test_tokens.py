"""calibration/tokens.py: tokens as transformers makes them, in pieces. Oracle and property tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_model
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from compresskit.calibration import encode, tokens
from compresskit.errors import CheckpointError


@pytest.mark.parametrize("special_tokens", [True, False])
@pytest.mark.parametrize("with_start", [True, False])
@given(text=st.text(max_size=40))
def test_tokens_are_those_of_transformers(
    special_tokens: bool, with_start: bool, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = _tokenizer_folder(tmp_path_factory, with_start)
    expected = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=special_tokens).input_ids
    assert encode(folder, text, special_tokens) == expected
    assert (encode(folder, text, True)[:1] == [1]) >= with_start


_FOLDERS: dict[bool, Path] = {}


def _tokenizer_folder(factory: pytest.TempPathFactory, with_start: bool) -> Path:
    """A tokenizer that truncates and pads on its own, which `encode` must not do; made once."""
    if with_start not in _FOLDERS:
        folder = make_model(factory.mktemp("tokenizer"), "llama")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        if with_start:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        tokenizer.save(str(folder / "tokenizer.json"))
        _FOLDERS[with_start] = folder
    return _FOLDERS[with_start]


def test_a_tokenizers_own_truncation_and_padding_are_ignored(tiny: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny["llama"] / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(encode(tmp_path, "ten bytes!", special_tokens=False)) == 10


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 9))
def test_pieces_make_up_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PIECE_CHARACTERS", size)
        parts = tokens.pieces(text)
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        encode(tmp_path, "text", special_tokens=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        encode(tmp_path, "text", special_tokens=False)
