"""Run `prune vocabulary`: count, choose, check the new tokenizer against the old one, copy the rows that stay."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from compresskit.checkpoint.folder import held
from compresskit.checkpoint.manifest import check_unchanged, fingerprint, manifest
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.writer import Writer
from compresskit.errors import UnsupportedArchitecture
from compresskit.machine.progress import ProgressBars
from compresskit.pruning.vocabulary.method import Vocabulary, VocabularyOptions
from compresskit.pruning.vocabulary.request import VocabularyRequest, changed_lines, open_request
from compresskit.stages import parse_bytes

COMPARED_LINES = 64
"""Lines that transformers' own tokenizers of source and result cut."""


def trim(method: Vocabulary, source_name: str, out: Path, options: VocabularyOptions, quiet: bool = True) -> dict[str, Any]:
    """Remove tokens of a checkpoint folder's model, into another folder.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    started = time.monotonic()
    request = open_request(method, source_name, out, options)
    checkpoint = request.model.checkpoint
    if options.verify:
        check_unchanged(checkpoint)
    with ProgressBars(quiet) as bars, held(out, options.overwrite) as work:
        bars("reading the texts", 0, 3)
        changed = changed_lines(request, request.lines)
        settings = {"method": "vocabulary", **method.model_dump()}
        outputs = request.outputs()
        writer = Writer(work, outputs, parse_bytes(options.max_shard_size), lambda: fingerprint("prune", settings, request.kept))
        writer.start(checkpoint.folder)
        bars("copying", 1, 3)
        _write(request, writer)
        bars("checking", 2, 3)
        _check_stock(request, writer.partial)
        facts = _facts(request, changed)
        writer.commit(manifest("prune", settings, checkpoint, writer.hashes(), facts | _provenance(request)))
    before = checkpoint.parameters, checkpoint.bytes
    return stage_result("prune", settings, out, checkpoint, before, writer.written) | facts | time_and_memory(started)


def _write(request: VocabularyRequest, writer: Writer) -> None:
    import torch

    rows = torch.tensor(request.kept)
    for name in sorted(request.by_token):
        writer.put(name, request.model.checkpoint.read(name)[rows])
    writer.copy_missing(request.model.checkpoint)


def _facts(request: VocabularyRequest, changed: int) -> dict[str, Any]:
    counts = request.counts
    gone = sum(count for token, count in counts.items() if token not in request.number)
    return {
        "tokens_before": request.rows,
        "tokens_after": len(request.kept),
        "text_tokens_kept": 1 - gone / max(1, counts.total()),
        "lines": len(request.lines),
        "lines_cut_otherwise": changed,
    }


def _provenance(request: VocabularyRequest) -> dict[str, Any]:
    """What the manifest alone states: which tokens of the source stay (one bit each), by which texts."""
    import torch

    from compresskit.pruning.walk import bitmask

    return {"kept_tokens": bitmask(torch.tensor(request.kept), request.rows), "texts": [what for _, what in request.texts]}


def _check_stock(request: VocabularyRequest, result: Path) -> None:
    """Compare transformers' tokenizers of source and result on some lines.

    Raises:
        UnsupportedArchitecture: they differ where every token has stayed.
    """
    from compresskit.models.tokenizer import open_tokenizer, tokenizing

    folder = request.model.checkpoint.folder
    old, new = open_tokenizer(folder), open_tokenizer(result)
    step = max(1, len(request.lines) // COMPARED_LINES)
    with tokenizing(result):
        for line in request.lines[::step]:
            before, after = (each(line).input_ids for each in (old, new))
            expected = [request.number.get(token) for token in before]
            if None not in expected and expected != after:
                raise UnsupportedArchitecture(
                    f"{folder}: transformers' {type(old).__name__} cuts {line[:40]!r} differently once tokens are gone; "
                    "save it as a plain tokenizer.json first"
                )
