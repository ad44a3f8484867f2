"""pruning/vocabulary/tokenizer.py: a text whose tokens all stay is cut as before, by the tokenizers library itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from compresskit.errors import CheckpointError, CompresskitError, UnsupportedArchitecture
from compresskit.pruning.vocabulary.tokenizer import FILE, TokenizerFile, cut, open_tokenizer_file, parts
from tests.trained_tokenizers import LATE, TEXT, made

KINDS = ("byte-level", "BPE", "Unigram")
WORDS = sorted({word for line in TEXT for word in line.replace(",", " ,").split()})


def file_of(kind: str) -> TokenizerFile:
    return TokenizerFile(Path(FILE), json.loads(made(kind)))


def kept_of(file: TokenizerFile, tokens: set[int]) -> list[int]:
    return sorted(set[int]().union(*(file.closure(each) for each in tokens | file.smallest() | file.added)))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_texts_of_kept_tokens_are_cut_as_before_and_others_come_back_whole(kind: str, data: st.DataObject) -> None:
    file, old = file_of(kind), Tokenizer.from_str(made(kind))
    words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join)
    corpus = data.draw(st.lists(words, min_size=1, max_size=4))
    kept = kept_of(file, {token for line in corpus for token in old.encode(line, add_special_tokens=False).ids})
    new = Tokenizer.from_str(json.dumps(cut(file, kept)))
    number = {before: after for after, before in enumerate(kept)}
    assert [new.id_to_token(after) for after in range(len(kept))] == [old.id_to_token(before) for before in kept]
    assert new.get_vocab_size() == len(kept)
    for line in corpus:
        assert new.encode(line, add_special_tokens=False).ids == [
            number[token] for token in old.encode(line, add_special_tokens=False).ids
        ]
    other = data.draw(words | st.text(max_size=12).filter(lambda text: "▁" not in text))
    before, after = (each.encode(other, add_special_tokens=False).ids for each in (old, new))
    assert new.decode(after, skip_special_tokens=False) == old.decode(before, skip_special_tokens=False)


@pytest.mark.parametrize("kind", ["byte-level", "BPE"])
def test_every_token_is_made_by_the_merges_of_its_parts_alone(kind: str) -> None:
    """The library, given only the parts of one token, cuts the token's characters into that token."""
    file, merges = file_of(kind), file_of(kind).merges
    made_tokens = [token for token in file.token_ids if token in {first + second for first, second in merges}]
    assert made_tokens
    for token in made_tokens[:: max(1, len(made_tokens) // 25)]:
        needed = parts(token, merges)
        assert {token, *token} <= needed <= set(file.token_ids)
        kept = sorted(file.token_ids[part] for part in needed)
        ids = {part: place for place, part in enumerate(sorted(needed))}
        pairs = [pair for pair in merges if {*pair, "".join(pair)} <= needed]
        from tokenizers import models

        alone = Tokenizer(models.BPE(ids, pairs))
        assert alone.encode(token).tokens == [token]
        assert kept == sorted(file.closure(file.token_ids[token]))


def test_what_no_merges_make_needs_itself_alone() -> None:
    assert parts("abc", {("a", "b"): 0}) == {"abc"}


def test_what_a_post_processor_adds_is_renumbered() -> None:
    """A start token that is no added token stays too."""
    file = file_of("byte-level")
    file.content["added_tokens"] = [each for each in file.content["added_tokens"] if each["content"] != "<s>"]
    assert file.put_around() == {1}
    kept = kept_of(file, file.put_around())
    new = Tokenizer.from_str(json.dumps(cut(file, kept)))
    assert new.encode("a").tokens[0] == "<s>"
    assert new.encode(f"a{LATE}").ids[-1] == len(kept) - 1


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"type": "WordPiece"}, UnsupportedArchitecture, "of type 'WordPiece'"),
        ({"end_of_word_suffix": "</w>"}, UnsupportedArchitecture, "end_of_word_suffix"),
        ({"byte_fallback": False}, UnsupportedArchitecture, "has no bytes"),
        ({"vocab": None}, CheckpointError, "no usable tokenizer"),
        ({"vocab": {"a": "1"}}, CheckpointError, "no usable tokenizer"),
        ({"merges": [["a"]]}, CheckpointError, "no usable tokenizer"),
        ({"merges": [[["a"], "b"]]}, CheckpointError, "no usable tokenizer"),
    ],
)
def test_what_cannot_be_cut_is_refused(
    change: dict[str, object], kind: type[CompresskitError], said: str, tmp_path: Path
) -> None:
    content = json.loads(made("BPE"))
    content["model"] |= change
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(kind, match=said):
        open_tokenizer_file(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; save the tokenizer"):
        open_tokenizer_file(tmp_path)
