"""compensation/request.py: pairs of models that do not fit, and settings that cannot be, are refused. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compensation_runs import run
from tiny_models import make_model

from compresskit.checkpoint.stock import load_whole
from compresskit.compensation.eora import EoRA
from compresskit.compensation.method import CompensateMethod
from compresskit.errors import CompresskitError, RequestError
from compresskit.methods import STAGES


def test_equal_models_have_nothing_to_compensate(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    result = run(EoRA(rank=4), tiny["llama"], tmp_path / "out", tiny["llama"], text)
    assert "nothing to compensate" in result["note"]
    assert result["output"] == str(tiny["llama"])
    assert not (tmp_path / "out").exists()


def test_bad_requests_are_refused_before_any_work(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    network = load_whole(tiny["llama"], torch.float32)
    network.resize_token_embeddings(300)
    network.save_pretrained(larger)
    wider = make_model(tmp_path / "wider", "llama", intermediate_size=128)
    renamed = make_model(tmp_path / "renamed", "llama")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 258
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    run(EoRA(rank=4), rounded, tmp_path / "adapter", tiny["llama"], text)
    cases: list[tuple[str, CompensateMethod, Path, Path]] = [
        ("vocabulary", EoRA(), rounded, larger),
        ("family", EoRA(), rounded, tiny["opt"]),
        ("tokenizer", EoRA(), rounded, renamed),
        ("prunings", EoRA(), rounded, wider),
        ("is an adapter", EoRA(), tmp_path / "adapter", tiny["llama"]),
        ("exceeds 16", EoRA(rank=17), rounded, tiny["llama"]),
        ("less than one pair", EoRA(rank_budget=1e-4), rounded, tiny["llama"]),
        ("leaves nothing", EoRA(ignore=("model",)), rounded, tiny["llama"]),
    ]
    for message, method, source, original in cases:
        with pytest.raises(CompresskitError, match=message) as caught:
            run(method, source, tmp_path / "out", original, text)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(RequestError, match="pass one of them"):
        EoRA(rank=4, rank_budget=0.1)
    assert "compensate" in STAGES
