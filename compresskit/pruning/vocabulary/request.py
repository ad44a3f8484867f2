"""Request of `prune vocabulary`: the tokens of the texts, those that stay, and the files that come of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from compresskit.calibration import sources
from compresskit.calibration.tokens import pieces
from compresskit.checkpoint import source
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.side_files import side_files
from compresskit.checkpoint.small_files import read_json, read_text
from compresskit.checkpoint.work_folder import check_out, check_space
from compresskit.errors import CheckpointError, RequestError, UnsupportedArchitecture
from compresskit.models import layouts
from compresskit.models.load import open_any
from compresskit.models.model import Model, config_value, with_config_value
from compresskit.models.tokenizer import check_files, tokenizing
from compresskit.pruning.vocabulary.choice import check_scripts, kept_tokens, of_scripts
from compresskit.pruning.vocabulary.method import Vocabulary, VocabularyOptions
from compresskit.pruning.vocabulary.numbers import named_tokens, renumbered, renumbered_tokens
from compresskit.pruning.vocabulary.tokenizer import FILE, TokenizerFile, cut, open_tokenizer_file
from compresskit.stages import parse_bytes

KEEP_FROM = "--keep-from"
SIZE_KEYS = ("vocab_size", "text_config.vocab_size")
"""Where config.json states the number of tokens."""
GENERATION, TOKENIZER = "generation_config.json", "tokenizer_config.json"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
ROLES = "\nsystem\nuser\nassistant\ntool\n"
"""What a chat template adds that does not stand in it."""
SAME_CONTENT = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json", "tekken.json")
"""Files that hold the whole vocabulary again; transformers and vLLM take tokenizer.json."""
OWN_TOKENIZER = "tekken.json"
"""A tokenizer that vLLM and others prefer to tokenizer.json."""


@dataclass(frozen=True)
class VocabularyRequest:
    """A request to remove tokens of a model."""

    method: Vocabulary
    model: Model
    out: Path
    options: VocabularyOptions
    file: TokenizerFile

    def check(self) -> None:
        """Refuse what cannot lose tokens; reads no weights, and of the texts only the starts.

        Raises:
            RequestError: no text is named, or an unusable one, or an unknown script.
            UnsupportedArchitecture: tensors besides embedding and head have an entry for every token.
            CheckpointError: the tokenizer has tokens that the model does not.
        """
        method, model = self.method, self.model
        folder = model.checkpoint.folder
        if not method.keep_from and not method.keep_scripts:
            raise RequestError(f"prune vocabulary: nothing says which tokens are needed; pass {KEEP_FROM} TEXT or --keep-scripts")
        for spec in method.keep_from:
            parts = sources.parse(spec, KEEP_FROM)
            if any(isinstance(each, sources.SelfSource) for each in parts):
                raise RequestError(f"{KEEP_FROM} {spec}: a model's own samples need every token; give a text")
            sources.check(spec, len(parts), 1, KEEP_FROM)
        check_scripts(method.keep_scripts)
        check_files(folder)
        if model.adapter is not None:
            raise RequestError(f"{folder}: has an adapter beside its weights; merge it first, or cut the model without it")
        if (folder / OWN_TOKENIZER).is_file():
            raise UnsupportedArchitecture(f"{folder / OWN_TOKENIZER}: a tokenizer of its own that would stay as it is; remove it")
        if beyond := sorted(number for number in self.file.added if number >= self.rows):
            raise CheckpointError(f"{self.file.path}: token {beyond[0]} is beyond the model's {self.rows:,}; restore the file")
        self._check_tensors()
        parse_bytes(self.options.max_shard_size)
        check_out(self.out, folder, self.options.overwrite)
        check_space(self.out, model.checkpoint.stored_bytes)
        side_files(folder)

    def _check_tensors(self) -> None:
        """Refuse a model that has more by token than an embedding and a head, or one of them in low bits."""
        model, tensors = self.model, self.model.checkpoint.tensors
        if model.stored_name(f"{model.architecture.embedding}.weight") not in self.by_token:
            raise UnsupportedArchitecture(
                f"{model.checkpoint.folder}: no embedding of {self.rows:,} rows is found; nothing to cut"
            )
        stored_head = model.stored_name(model.architecture.head)
        others = [
            spec for name, spec in tensors.items()
            if model.stored_block_of(name) is None and name not in self.by_token
            and (self.rows in spec.shape or name.startswith(f"{stored_head}."))
        ]  # fmt: skip
        if others:
            raise UnsupportedArchitecture(
                f"{model.checkpoint.folder}: {others[0].name} {list(others[0].shape)} has entries by token that are not known to "
                "be independent of each other; such a vocabulary cannot be cut"
            )

    @property
    def rows(self) -> int:
        """Tokens that the embedding knows."""
        return self.model.vocabulary

    @cached_property
    def by_token(self) -> set[str]:
        """Stored names of the tensors with a row for every token: embedding, head, and the head's bias."""
        model = self.model
        names = (f"{model.architecture.embedding}.weight", f"{model.architecture.head}.weight", f"{model.architecture.head}.bias")
        stored = {model.stored_name(name) for name in names} & set(model.checkpoint.tensors)
        return {name for name in stored if model.checkpoint.spec(name).shape[0] == self.rows}

    @cached_property
    def texts(self) -> list[sources.Text]:
        """The text of every --keep-from, and what it is."""
        parsed = [each for spec in self.method.keep_from for each in sources.parse(spec)]
        return [sources.read_text(each) for each in parsed if not isinstance(each, sources.SelfSource)]

    @cached_property
    def lines(self) -> list[str]:
        """All lines of the texts, with their ends."""
        return [line for text, _ in self.texts for piece in pieces(text) for line in piece.splitlines(keepends=True)]

    def tokenizer(self, content: str | None = None) -> Any:
        """The tokenizers library's tokenizer of the source, or of this content of a tokenizer.json."""
        from tokenizers import Tokenizer

        with tokenizing(self.file.path.parent):
            found = Tokenizer.from_file(str(self.file.path)) if content is None else Tokenizer.from_str(content)
        found.no_truncation()
        found.no_padding()
        return found

    @cached_property
    def counts(self) -> Counter[int]:
        """How often the texts have each token."""
        tokenizer, found = self.tokenizer(), Counter[int]()
        with tokenizing(self.file.path.parent):
            for text, _ in self.texts:
                for piece in pieces(text):
                    found.update(tokenizer.encode(piece, add_special_tokens=False).ids)
            for coded in tokenizer.encode_batch(self.lines, add_special_tokens=False):
                found.update(set(coded.ids) - found.keys())  # what a line has alone, for a line alone to be cut as before
        return found

    @cached_property
    def required(self) -> set[int]:
        """Tokens that stay whatever the texts say."""
        folder, found = self.model.checkpoint.folder, self.file.smallest() | self.file.added | self.file.put_around()
        found |= named_tokens(self.model.checkpoint.config, self.rows) | named_tokens(self._json(GENERATION), self.rows)
        tokenizer = self.tokenizer()
        template = "".join(read_text(folder / name) for name in TEMPLATES if (folder / name).is_file())
        template += json.dumps(self._json(TOKENIZER).get("chat_template") or "", ensure_ascii=False)
        with tokenizing(folder):
            found |= set(tokenizer.encode(template + ROLES, add_special_tokens=False).ids)
        return {token for token in found if token < self.rows}

    @cached_property
    def kept(self) -> list[int]:
        """Tokens that stay, ascending."""
        known = {token for token in (*self.file.tokens, *self.file.added) if token < self.rows}
        tokenizer, scripts = self.tokenizer(), self.method.keep_scripts
        shown = {token: tokenizer.decode([token], skip_special_tokens=False) for token in known} if scripts else {}
        chosen = of_scripts(shown, scripts)
        return kept_tokens(self.method, self.required & known, self.counts, chosen, known, self.file.closure)

    @cached_property
    def number(self) -> dict[int, int]:
        """New number of every kept token."""
        return {old: new for new, old in enumerate(self.kept)}

    def _json(self, name: str) -> dict[str, Any]:
        path = self.model.checkpoint.folder / name
        return read_json(path) if path.is_file() else {}

    @cached_property
    def tokenizer_text(self) -> str:
        """The new tokenizer.json."""
        return json.dumps(cut(self.file, self.kept), ensure_ascii=False, indent=1) + "\n"

    def outputs(self) -> Outputs:
        """Every file of the result; reads the texts."""
        model, rows = self.model, len(self.kept)
        specs = [
            replace(spec, shape=(rows, *spec.shape[1:])) if name in self.by_token else spec
            for name, spec in model.checkpoint.tensors.items()
        ]
        config = renumbered(model.checkpoint.config, self.number)
        for key in SIZE_KEYS:
            if config_value(config, key) == self.rows:
                config = with_config_value(config, key, rows)
        files = {**layouts.own_files(model), FILE: self.tokenizer_text}
        if generation := self._json(GENERATION):
            files[GENERATION] = json.dumps(renumbered(generation, self.number), indent=2) + "\n"
        if tokenizer := self._json(TOKENIZER):
            files[TOKENIZER] = json.dumps(renumbered_tokens(tokenizer, self.number), ensure_ascii=False, indent=2) + "\n"
        return Outputs(specs, config, files=files, left_out=frozenset(SAME_CONTENT))


def changed_lines(request: VocabularyRequest, lines: Sequence[str]) -> int:
    """Compare the new tokenizer with the old one, line by line.

    Returns:
        How many lines are cut into other tokens, because some of theirs have gone.

    Raises:
        UnsupportedArchitecture: a line whose tokens all stay is cut differently, or a line does not come back from its tokens.
    """
    old, new, changed = request.tokenizer(), request.tokenizer(request.tokenizer_text), 0
    _check_numbers(request, new)
    with tokenizing(request.file.path.parent):
        pairs = zip(*(each.encode_batch(list(lines), add_special_tokens=False) for each in (old, new)), strict=True)
        for line, (before, after) in zip(lines, pairs, strict=True):
            expected = [request.number.get(token) for token in before.ids]
            if None not in expected:
                same = expected == after.ids
            else:
                changed += 1
                same = _text(old, before.ids) == _text(new, after.ids)
            if not same:
                raise UnsupportedArchitecture(
                    f"{request.file.path}: cuts {line[:40]!r} differently once tokens are gone; this tokenizer cannot be cut "
                    "safely"
                )
    return changed


def _text(tokenizer: Any, ids: Collection[int]) -> str:
    found: str = tokenizer.decode(ids, skip_special_tokens=False)
    return found


def _check_numbers(request: VocabularyRequest, new: Any) -> None:
    """Raise UnsupportedArchitecture unless the library gives every kept token the number that was planned."""
    old = request.tokenizer()
    for before, after in request.number.items():
        token = old.id_to_token(before)
        if new.id_to_token(after) != token or new.token_to_id(token) != after:
            raise UnsupportedArchitecture(f"{request.file.path}: token {token!r} gets another number; it cannot be cut safely")


def open_request(method: Vocabulary, source_name: str, out: Path, options: VocabularyOptions) -> VocabularyRequest:
    """Open the source and refuse what cannot be done, before any weight is read.

    Returns:
        The request, all checks passed.

    Raises:
        CompresskitError: of the kinds in errors.py, what is wrong with the source, a text, OUT or a setting.
    """
    model = open_any(source_name)
    request = VocabularyRequest(method, model, out, options, open_tokenizer_file(source.resolve(source_name)))
    request.check()
    return request
