"""The client bench: its page is what its rows say, and a sample of it runs here, in transformers and peft. End to end.

benchmarks/clients.py runs every form of output, in vLLM and llama.cpp too.
"""

from __future__ import annotations

import json
from pathlib import Path

import client_page
import client_runs
import pytest
from client_artifacts import ARTIFACTS, BY_NAME, Kitchen
from stock_tools import run_stock
from tiny_models import make_model

SAMPLE = (("ragged", "transformers"), ("4-bit-symmetric", "transformers"), ("eora-over-4-bit", "peft"))
SIZES = {"hidden_size": 64, "intermediate_size": 256}


def test_the_page_is_made_from_the_rows() -> None:
    assert client_page.text(client_page.rows()) == client_page.PAGE.read_text()


def test_no_row_is_wrong_but_those_known_and_each_refusal_has_the_client_s_words() -> None:
    rows = client_page.rows()
    assert [row for row in rows if row["verdict"] == "WRONG"] == []
    assert [row for row in rows if row["verdict"] == "refused" and not row["words"]] == []
    assert {row["artifact"] for row in rows} == {artifact.name for artifact in ARTIFACTS}
    assert [row for row in rows if client_runs.judged(row) != row] == []
    assert all(row["command"] == BY_NAME[row["artifact"]].command for row in rows)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, "runs"),
        ({"generated_difference": 0.2}, "WRONG"),
        ({"prompt_difference": 0.2}, "WRONG"),
        ({"prompt_difference": None}, "runs"),
        ({"furthest_token": 0.3}, "runs"),
        ({"furthest_token": 0.5}, "WRONG"),
    ],
)
def test_a_verdict_needs_both_the_probabilities_and_the_tokens(changed: dict[str, float], expected: str) -> None:
    row = {"generated_difference": 0.05, "prompt_difference": 0.05, "furthest_token": 0.0, "bound": 0.1}
    assert client_runs.verdict(row | changed) == expected


@pytest.mark.slow
def test_a_sample_runs_in_transformers_and_peft(tmp_path: Path) -> None:
    """Right files run; an adapter that a client would ignore is wrong."""
    model = make_model(tmp_path / "model", "llama", **SIZES)
    kitchen = Kitchen(tmp_path / "made", model, blocks=2)
    jobs = [client_runs.job(BY_NAME[name], client, *kitchen.files(BY_NAME[name])) for name, client in SAMPLE]
    ignoring = jobs[-1] | {"adapter": None, "client": "transformers", "name": "ignoring:eora-over-4-bit"}
    (tmp_path / "jobs.json").write_text(json.dumps([*jobs, ignoring]))
    script = Path(client_runs.__file__).with_name("client_transformers.py").read_text() + "\nmain(*arguments)\n"
    run_stock(script, [str(tmp_path / "jobs.json"), str(tmp_path / "results.jsonl")], tmp_path)
    verdicts = {}
    for line in (tmp_path / "results.jsonl").read_text().splitlines():
        answer = json.loads(line)
        artifact = BY_NAME[answer["job"].partition(":")[2]]
        row = client_runs.judge(artifact, kitchen.files(artifact), jobs[0]["prompts"], answer)
        verdicts[answer["job"]] = row["verdict"]
    assert verdicts.pop("ignoring:eora-over-4-bit") == "WRONG"
    assert set(verdicts.values()) == {"runs"}, verdicts
