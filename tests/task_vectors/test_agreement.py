"""task_vectors/agreement.py: sources that compute otherwise, or number their tokens otherwise, are refused. End to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from tiny_models import make_adapter, make_model

from compresskit.errors import CheckpointError
from compresskit.task_vectors.agreement import token_ids


@pytest.fixture
def pair(tiny: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of one checkpoint."""
    return tuple(Path(shutil.copytree(tiny["llama"], tmp_path / name)) for name in "ab")  # type: ignore[return-value]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swap_two_ids(content: dict[str, Any]) -> None:
    table = content["model"]["vocab"]
    first, second = list(table)[5:7]
    table[first], table[second] = table[second], table[first]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"rope_parameters": {"rope_theta": 50000.0, "rope_type": "default"}}, "rope_theta"),
        ({"rope_parameters": {"rope_theta": 10000.0, "rope_type": "linear", "factor": 4.0}}, "rope_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}, "num_attention_heads"),
        ({"sliding_window": 8, "model_type": "mistral"}, "model_type"),
    ],
)
def test_checkpoints_that_compute_otherwise_are_refused(
    change: dict[str, Any], said: str, run: Run, tiny: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(pair[1] / "config.json", lambda config: config.update(change))
    code, text, err = run("merge", "average", *pair, tmp_path / "out", "--base", tiny["llama"])
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert str(pair[1] / "config.json") in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "noted"),
    [
        ({"eos_token_id": 3}, "eos_token_id"),
        ({"max_position_embeddings": 512}, "max_position_embeddings"),
        ({"use_cache": False, "attention_dropout": 0.1, "torch_dtype": "float16", "initializer_range": 0.5}, ""),
    ],
)
def test_other_differences_are_said_or_passed_over(
    change: dict[str, Any], noted: str, run: Run, tiny: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    edit(pair[1] / "config.json", lambda config: config.update(change))
    code, text, err = run("merge", "average", *pair, tmp_path / "out", "--base", tiny["llama"], "--json")
    assert code == 0, err
    notes = json.loads(text).get("notes", [])
    assert len(notes) == bool(noted)
    assert all(noted in note and note in err for note in notes)


def test_a_value_left_out_means_what_its_class_says(
    run: Run, tiny: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path
) -> None:
    stated = json.loads((pair[0] / "config.json").read_text())["rms_norm_eps"]
    assert stated == 1e-6  # the class's own
    edit(pair[1] / "config.json", lambda config: config.pop("rms_norm_eps"))
    code, text, err = run("merge", "average", *pair, tmp_path / "out", "--base", tiny["llama"], "--json")
    assert code == 0, err
    assert "notes" not in json.loads(text)


def test_swapped_ids_of_tokens_are_refused(run: Run, tiny: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit(pair[1] / "tokenizer.json", swap_two_ids)
    code, _, err = run("merge", "average", *pair, tmp_path / "out", "--base", tiny["llama"])
    assert (code, err.count("\n")) == (2, 1)
    assert "token 5" in err
    assert str(pair[1]) in err
    ternary = tmp_path / "c"
    assert run("quantize", "compeft", pair[1], ternary, "--base", tiny["llama"])[0] == 0
    code, _, err = run("merge", "average", pair[0], ternary, tmp_path / "out", "--base", tiny["llama"])
    assert (code, err.count("\n")) == (2, 1)
    assert "token 5" in err


def test_tokens_of_one_source_alone_are_said(run: Run, tiny: dict[str, Path], pair: tuple[Path, Path], tmp_path: Path) -> None:
    edit(pair[1] / "tokenizer.json", lambda content: content["added_tokens"].append({"id": 300, "content": "<new>"}))
    code, text, err = run("merge", "average", *pair, tmp_path / "out", "--base", tiny["llama"], "--json")
    assert code == 0, err
    assert "<new>" in json.loads(text)["notes"][0]


def test_tables_of_tokens_are_read_in_every_form(tmp_path: Path) -> None:
    assert token_ids(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1}')
    assert token_ids(tmp_path) == {"a": 0, "b": 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0], ["b", -2.5]]}, "added_tokens": []}))
    assert token_ids(tmp_path) == {"a": 0, "b": 1}
    for broken in ({"model": {"vocab": {"a": "0"}}}, {"model": {"vocab": [[]]}}, {"added_tokens": [{}]}):
        (tmp_path / "tokenizer.json").write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            token_ids(tmp_path)


def test_adapters_of_other_bases_are_said(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    sources = [make_adapter(tmp_path / str(seed), tiny["llama"], seed) for seed in range(2)]
    edit(sources[1] / "adapter_config.json", lambda config: config.update(base_model_name_or_path="other/base"))
    code, text, err = run("merge", "average", *sources, tmp_path / "out", "--json")
    assert code == 0, err
    assert "other/base" in json.loads(text)["notes"][0]


def test_checkpoints_of_other_depths_are_told_what_helps(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    shallow = make_model(tmp_path / "shallow", "llama", num_hidden_layers=2)
    for sources in ((tiny["llama"], shallow), (shallow, tiny["llama"])):
        code, _, err = run("merge", "average", *sources, tmp_path / "out", "--base", tiny["llama"])
        assert (code, err.count("\n")) == (2, 1)
        assert "--rank" not in err
        assert "depth" in err
        assert "layers.2" in err
    code, _, err = run("merge", "average", shallow, shallow, tmp_path / "out", "--base", tiny["llama"], "--rank", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "leave --rank out" in err
