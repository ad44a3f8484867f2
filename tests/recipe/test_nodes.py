"""recipe/nodes.py: what a step needs of a node, and what keeps a node from doing steps. Against tables by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.errors import RequestError
from compresskit.recipe.nodes import Needs, Node, check_node, look, needs, read_by
from compresskit.recipe.reading import load
from compresskit.recipe.steps import Step

GB = 10**9
SMALL, LARGE = Node("a", "small", 8, 0, 16 * GB), Node("b", "large", 64, 4, 256 * GB)


def step(folder: Path, device: str, source: str = "m") -> Step:
    (folder / "r.yaml").write_text(f"source: {source}\nsteps: [{{quantize: rtn, device: '{device}', calibration: text.txt}}]\n")
    return load(folder / "r.yaml").steps[0]


@pytest.mark.parametrize(
    ("device", "nodes", "threads", "found"),
    [
        ("cpu", [SMALL, LARGE], "", Needs(8, 0, GB)),
        ("cpu", [SMALL, LARGE], "2", Needs(2, 0, GB)),
        ("cpu", [LARGE], "nonsense", Needs(64, 0, GB)),
        ("auto", [SMALL], "", Needs(8, 0, GB)),
        ("auto", [SMALL, LARGE], "", Needs(16, 1, GB)),
        ("cuda", [SMALL, LARGE], "", Needs(16, 1, GB)),
        ("cuda", [LARGE], "3", Needs(3, 1, GB)),
    ],
)
def test_a_step_takes_its_threads_its_gpu_and_its_memory(
    device: str, nodes: list[Node], threads: str, found: Needs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert needs(step(tmp_path, device), GB, nodes) == found


def test_memory_that_plan_does_not_know_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert needs(step(tmp_path, "cpu"), None, [SMALL]) == Needs(1, 0, 0)


@pytest.mark.parametrize(
    ("device", "threads", "memory", "said"),
    [
        ("cuda", "1", GB, r"needs 1 CPU, 1 GPU, 1\.00 GB of memory, and no node has that .*small.*; add a node with a GPU"),
        ("cpu", "9", GB, r"needs 9 CPUs, .*; set OMP_NUM_THREADS lower, or add a larger node$"),
        ("cpu", "1", 17 * GB, r"needs 1 CPU, 17\.0 GB of memory, .*; lower samples or sequence_length, or add a larger node$"),
        ("cuda:1", "1", GB, r"device cuda:1: the cluster deals the GPUs; write cuda$"),
    ],
)  # fmt: skip
def test_what_no_node_has_is_refused_with_what_they_have_and_the_remedy(
    device: str, threads: str, memory: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    with pytest.raises(RequestError, match=f"^step 'quantize': {said}"):
        needs(step(tmp_path, device), memory, [SMALL])


def test_what_steps_read_are_the_paths_that_exist_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("m", "text.txt", "more.txt"):
        (tmp_path / name).mkdir()
    (tmp_path / "r.yaml").write_text(
        "source: m\nsteps:\n  - {prune: cfsp, calibration: text.txt+builtin+more.txt}\n  - {evaluate: , against: hub/model}\n"
    )
    assert read_by(load(tmp_path / "r.yaml").steps) == ["m", "text.txt", "more.txt"]


def test_a_node_that_sees_and_has_all_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    (tmp_path / "text.txt").touch()
    seen = look(str(tmp_path), "token", "secret", ["text.txt"])
    check_node("n", seen, seen["installed"], Path("out"))
    assert set(seen["installed"]) == {"compresskit", "torch", "transformers", "files of compresskit"}


@pytest.mark.parametrize(
    ("token", "inputs", "other", "said"),
    [
        ("another", [], {}, r"does not see out; choose an OUT on storage that all nodes share"),
        (None, [], {}, r"does not see out; "),
        ("secret", ["text.txt", "model"], {}, r"does not see text\.txt, model; put it on storage that all nodes share"),
        ("secret", [], {"torch": "2.6.0", "transformers": "none"},
         r"has torch \S+ \(here 2\.6\.0\), transformers \S+ \(here none\); install there what is installed here"),
        ("secret", [], {"files of compresskit": "0"}, r"has files of compresskit \w{12} \(here 0\); install"),
    ],
)  # fmt: skip
def test_a_node_that_lacks_something_is_named_in_one_line(
    token: str | None, inputs: list[str], other: dict[str, str], said: str, tmp_path: Path
) -> None:
    if token:
        (tmp_path / "token").write_text(token)
    seen = look(str(tmp_path), "token", "secret", inputs)
    with pytest.raises(RequestError, match=f"^node n: {said}"):
        check_node("n", seen, seen["installed"] | other, Path("out"))
