"""models/prunings.py: what a chain of prunings says of channels, whichever prunings lie before."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import make_model
from tokenizers import Tokenizer

from compresskit import prune
from compresskit.models.load import open_model
from compresskit.models.pair import pair
from compresskit.models.prunings import channel_prunings
from tests.trained_tokenizers import TEXT, made, write

pytestmark = pytest.mark.usefixtures("own_structures")


def test_removed_tokens_are_no_removed_channels(tmp_path: Path) -> None:
    """Channels removed after tokens: the model with fewer tokens is the original, and its one pruning is known."""
    source, few, narrow, text = (tmp_path / name for name in ("source", "few", "narrow", "text.txt"))
    make_model(source, "llama", vocab_size=Tokenizer.from_str(made("byte-level")).get_vocab_size())
    write(source, "byte-level")
    text.write_text("\n".join(TEXT[:2]), encoding="utf-8")
    prune(source, few, "vocabulary", keep_from=(str(text),), round_to=8, quiet=True)
    prune(few, narrow, "magnitude", sparsity=0.25, refit=False, round_to=8, allocation="uniform", quiet=True)
    assert [link["method"] for link in channel_prunings(open_model(narrow))] == ["magnitude"]
    found = pair(open_model(narrow), open_model(few))
    assert set(found.kept) == {name for name in found.compressed.linears if ".mlp." in name}
