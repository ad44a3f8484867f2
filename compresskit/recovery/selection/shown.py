"""The text of selected samples, exactly as their tokens spell it."""

from __future__ import annotations

import itertools
import json
from typing import Any

from compresskit.models.tokenizer import open_tokenizer, tokenizing
from compresskit.recovery.data.reading import Data
from compresskit.recovery.request import RecoverRequest
from compresskit.recovery.selection.files import FILE


def shown_samples(request: RecoverRequest, data: Data) -> list[dict[str, Any]]:
    """The first samples of OUT's selection, as many as `--show` asks for.

    Returns:
        Of each its "file" and "row", the text "before" the response, and the "response" with what ends it.
    """
    folder, options = request.model.checkpoint.folder, request.options
    tokenizer = open_tokenizer(folder, options.trust_remote_code)
    samples = {_key(s.instruction.file, s.instruction.row, [*s.instruction.turns, s.instruction.message]): s for s in data.pool}
    with (request.out / FILE).open(encoding="utf-8", newline="\n") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, options.show)]
    found = []
    for row in rows:
        sample = samples[_key(row["file"], row["row"], row["messages"])]
        parts = sample.tokens[: sample.response_start], sample.tokens[sample.response_start :]
        with tokenizing(folder):
            before, response = (tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in parts)
        found.append({"file": row["file"], "row": row["row"], "before": before, "response": response})
    return found


def _key(*values: object) -> str:
    """Files of one name may hold rows of one number."""
    return json.dumps(values)
