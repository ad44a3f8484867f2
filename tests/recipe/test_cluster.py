"""recipe/cluster.py and recipe/tasks.py: a recipe on a Ray cluster ends as without one, whatever dies. End to end.

The cluster is a real one, of two nodes on this machine; what dies, dies by SIGKILL.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from recipe_runs import weights
from tiny_models import make_model

from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.errors import CompresskitError, Interrupted, RequestError
from compresskit.recipe.reading import load
from compresskit.recipe.run import Wanted, run

RECIPE = """
source: {source}
defaults: {{calibration: {text}, samples: 16, sequence_length: 64}}
matrix: {{bits: [2, 3, 4, 8]}}
steps:
  - {{prune: cfsp, sparsity: 0.25, round_to: 8}}
  - {{quantize: gptq, bits: "${{bits}}", group_size: 8}}
  - {{evaluate: , against: source, data: {text}, windows: 2}}
gates: [size_ratio<=1]
"""
CELLS = (2, 3, 4, 8)
MEASURED = ("seconds", "peak_memory_bytes", "time_shares")
"""What two runs of the same steps need not have in common."""
PATIENCE_SECONDS = 60


class RealCluster:
    """Two nodes on this machine, of one processor and of two; this process is connected to it."""

    def __init__(self) -> None:
        ray = pytest.importorskip("ray", reason="runs on a cluster take the extra compresskit[ray]")
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": quick}
        self.cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
        self.large = self.cluster.add_node(num_cpus=2)
        self.ray = ray
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="CRITICAL")

    def kill_large_node(self) -> None:
        """As its machine would, without a farewell."""
        self.cluster.remove_node(self.large, allow_graceful=False)

    def shut_down(self) -> None:
        self.ray.shutdown()
        self.cluster.shutdown()


@pytest.fixture(scope="module")
def cluster() -> Iterator[RealCluster]:
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = RealCluster()
    yield found
    found.shut_down()
    patch.undo()


@pytest.fixture(scope="module")
def recipe(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A matrix of four cells over a model of six blocks, so that a step can be caught at work."""
    root = tmp_path_factory.mktemp("recipe")
    source = make_model(root / "deep", "llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    (root / "recipe.yaml").write_text(RECIPE.format(source=source, text=text_file))
    return root / "recipe.yaml"


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run without a cluster writes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run(load(recipe), out)
    return out


def when_at_work(folders: list[Path], act: Callable[[int], None]) -> threading.Thread:
    """Once a step in one of these folders has finished a block, `act` on the process that holds its lock."""

    def watch() -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            for work in map(WorkFolder, folders):
                try:
                    if json.loads(work.progress.read_text())["blocks"]:
                        act(int(json.loads(work.lock.read_text())["process"]))
                        return
                except (FileNotFoundError, ValueError):  # not there yet, or just being written
                    continue
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def comparable(value: Any, out: Path) -> Any:
    """A record without what a clock or a gauge measured, and without the place where it lies."""
    if isinstance(value, dict):
        return {key: comparable(each, out) for key, each in value.items() if key not in MEASURED}
    if isinstance(value, list):
        return [comparable(each, out) for each in value]
    return value.replace(str(out), "OUT") if isinstance(value, str) else value


def record(out: Path, file: str) -> Any:
    return comparable(json.loads((out / file).read_text()), out)


@pytest.mark.slow
def test_with_a_worker_killed_amid_its_step_a_run_ends_with_the_bytes_and_the_record_of_one_without_a_cluster(
    cluster: RealCluster, recipe: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out, killed, said = tmp_path / "out", [], []

    def kill(process: int) -> None:
        os.kill(process, signal.SIGKILL)
        killed.append(process)

    watching = when_at_work([out / f"quantize-bits-{bits}" for bits in CELLS], kill)
    run(load(recipe), out, Wanted(on="ray"), said.append)
    watching.join()
    assert killed and killed[0] != os.getpid()
    assert weights(out) == weights(alone)
    assert record(out, "report.json") == record(alone, "report.json")
    assert json.dumps(record(out, "run.json")) == json.dumps(record(alone, "run.json"))
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    assert said[-1].startswith("[") and "done on" in said[-1]
    assert run(load(recipe), out, Wanted(on="ray"))["ran"] == []


@pytest.mark.slow
def test_an_interrupt_stops_the_tasks_with_one_line_and_the_same_call_goes_on(
    cluster: RealCluster, recipe: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("compresskit.recipe.tasks.CANCEL_SECONDS", 30.0)
    out = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        when_at_work([out / "prune"], lambda process: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(Interrupted, match=r"^interrupted in step '[\w-]+'; the same command goes on from there$"):
            run(load(recipe), out, Wanted(on="ray"))
    finally:
        signal.signal(signal.SIGINT, before)
    # The worker may have finished before the word to stop reached it; what it did is there either way.
    assert (out / "prune").exists() or json.loads(WorkFolder(out / "prune").progress.read_text())["blocks"]
    assert not (out / ".shared").exists()
    assert run(load(recipe), out, Wanted(only="prune", on="ray"))["ran"] in (["prune"], [])
    pruned = ({name: found for name, found in weights(each).items() if name.startswith("prune")} for each in (out, alone))
    assert next(pruned) == next(pruned) != {}


@pytest.mark.slow
def test_a_node_that_does_not_see_out_is_named_before_any_step(
    cluster: RealCluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("compresskit.recipe.cluster.write_whole", lambda path, text: path.write_text("of another disk"))
    with pytest.raises(RequestError, match=r"^node [\w.-]+ \(\w{8}\): does not see .*out; choose an OUT on storage that all"):
        run(load(recipe), tmp_path / "out", Wanted(on="ray"))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["steps"] == {}


@pytest.mark.slow
def test_a_node_that_dies_with_a_step_that_no_other_can_take_is_one_line(
    cluster: RealCluster, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one on this cluster: the node is gone afterwards. The step may just have finished; then the next one lacks it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    out = tmp_path / "out"
    when_at_work([out / "prune"], lambda process: cluster.kill_large_node())
    with pytest.raises(CompresskitError, match=r"^node [\w.-]+ \(\w{8}\) died, and no other has 2 CPUs, [\d.]+ [MG]B of memory, which step '[\w-]+' needs; [^\n]*goes on when there is one$"):  # fmt: skip  # noqa: E501
        run(load(recipe), out, Wanted(on="ray"))


@pytest.mark.parametrize(
    ("on", "said"),
    [
        ("slurm", "no such place to run on; write --on ray, or --on ray:HOST:PORT"),
        ("ray:", "no such place to run on"),
        ("ray:ray://head:10001", "a client of Ray is not enough; run on one of the nodes, with --on ray:auto"),
        ("ray:head", "is no address"),
    ],
)
def test_a_place_that_is_none_is_refused_before_anything_is_written(
    on: str, said: str, run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="runs on a cluster take the extra compresskit[ray]")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    code, output, error = run("run", recipe, tmp_path / "out", "--on", on)
    assert (code, output, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"compresskit: error: --on {on}: {said}")
    assert not (tmp_path / "out").exists()


def test_without_ray_the_remedy_is_one_line(run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, error = run("run", recipe, tmp_path / "out", "--on", "ray")
    assert (code, error) == (2, "compresskit: error: --on ray: Ray is not installed; pip install 'compresskit[ray]'\n")


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["closed", "silent", "a web server"])
def test_an_address_where_no_ray_answers_is_one_line_within_the_stated_time(
    answer: bytes | None, run: Run, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="runs on a cluster take the extra compresskit[ray]")
    monkeypatch.setattr("compresskit.recipe.cluster.ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        if answer is None:
            server.close()
        else:
            threading.Thread(target=lambda: _answer(server, answer), daemon=True).start()
        code, _, error = run("run", recipe, tmp_path / "out", "--on", f"ray:127.0.0.1:{port}")
    assert (code, error.count("\n")) == (2, 1)
    assert f"--on ray:127.0.0.1:{port}: no Ray cluster answers within 0.2 seconds" in error
    assert not (tmp_path / "out").exists()


def _answer(server: socket.socket, answer: bytes) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(answer)
        time.sleep(0.0 if answer else 1.0)


def test_one_file_alone_imports_ray_and_none_loads_it_before_it_is_asked_for() -> None:
    package = Path(__file__).parents[2] / "compresskit"
    named = re.compile(r"^\s*(import ray\b|from ray\b)|import_module\(ENGINE\)", re.M)
    assert [path.name for path in package.rglob("*.py") if named.search(path.read_text())] == ["cluster.py"]
