"""task_vectors/candidates.py: what is tried in which order, and that the best is what is written. Oracle, end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from conftest import Run
from safetensors.torch import load_file

from compresskit.errors import NumericalError
from compresskit.formats.peft import WEIGHTS
from compresskit.task_vectors.candidates import STEP, choose
from compresskit.task_vectors.merge_request import SCALINGS, most_candidates
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.merging.task_arithmetic import TaskArithmetic

SHORT = ("--windows", 1, "--sequence-length", 32)


def quiet(done: int, total: int) -> None:
    assert 0 <= done < total


def test_the_grid_and_then_one_step_of_each_weight_find_the_nearest_minimum() -> None:
    wanted = np.log([0.9, 0.4])  # of the effective factors, scaling x weight

    def score(method: MergeMethod) -> list[float]:
        factors = np.log(method.scaling * method.source_weights(2).astype(float))
        return [float(np.square(factors - wanted).sum()), 1.0]

    best, found = choose(TaskArithmetic(), 2, score, quiet)
    grid = [factor * 0.4 for factor in SCALINGS]
    assert [each["scaling"] for each in found[: len(SCALINGS)]] == grid
    at = min(grid, key=lambda factor: float(np.square(np.log(factor) - wanted).sum()))
    assert best.scaling == at
    assert best.weights == (STEP, 1 / STEP)  # up for the first, and down, after up was worse, for the second
    assert len(found) == len(SCALINGS) + 3 <= most_candidates(2)
    assert min(each["loss"] for each in found) == found[-1]["loss"]
    assert found[-1]["losses"][1] == 1.0


def test_candidates_that_break_the_model_are_passed_over() -> None:
    def score(method: MergeMethod) -> list[float]:
        if method.scaling > 0.2:
            raise NumericalError("no finite loss")
        return [method.scaling]

    best, found = choose(TaskArithmetic(), 2, score, quiet)
    assert best.scaling == pytest.approx(0.1)
    assert [each["loss"] is None for each in found[: len(SCALINGS)]] == [factor * 0.4 > 0.2 for factor in SCALINGS]

    def broken(method: MergeMethod) -> list[float]:
        raise NumericalError(f"{method.scaling}")

    with pytest.raises(NumericalError, match="no candidate"):
        choose(TaskArithmetic(), 2, broken, quiet)


def test_the_best_adapter_is_written_and_scores_as_reported(
    run: Run, adapters: list[Path], tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    asked = ("--rank", 4, "--base", tiny["llama"], "--validation", text_file, "--validation", "builtin", *SHORT, "--json")
    code, text, err = run("merge", "average", *adapters[:2], tmp_path / "m", *asked)
    assert code == 0, err
    result = json.loads(text)
    tried, settings = result["candidates"], result["settings"]
    best = min(tried, key=lambda each: each["loss"])
    assert f"best of {len(tried)} candidates: scaling {best['scaling']:g}, " in err
    assert settings["scaling"] == best["scaling"]
    assert np.allclose(settings["weights"] or [1, 1], best["weights"], atol=1e-5)
    assert json.loads((tmp_path / "m" / "compresskit.json").read_text())["candidates"] == tried
    code, text, _ = run("evaluate", tiny["llama"], "--adapter", tmp_path / "m", "--data", text_file, *SHORT, "--json")
    assert math.isclose(math.log(json.loads(text)["perplexity"]), best["losses"][0], rel_tol=1e-5)
    flags = [flag for weight in settings["weights"] for flag in ("--weights", weight)]
    by_hand = ("--scaling", settings["scaling"], *flags, "--rank", 4)
    assert run("merge", "average", *adapters[:2], tmp_path / "n", *by_hand)[0] == 0
    assert (tmp_path / "m" / WEIGHTS).read_bytes() == (tmp_path / "n" / WEIGHTS).read_bytes()


def test_checkpoints_are_scored_whole(run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    base = tiny["llama"]
    asked = ("--base", base, "--validation", text_file, *SHORT, "--json")
    code, text, err = run("merge", "task-arithmetic", base, base, tmp_path / "m", *asked)
    assert code == 0, err
    assert len({each["loss"] for each in json.loads(text)["candidates"]}) == 1  # no difference, at any factor
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "m", base))
    assert all(bool((found[name] == before[name]).all()) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m"]


@pytest.mark.parametrize(
    ("validation", "said"), [("self", "cannot judge"), ("missing.txt", "missing.txt"), ("short.txt", "short.txt")]
)
def test_texts_that_cannot_judge_are_refused(
    validation: str, said: str, run: Run, adapters: list[Path], tiny: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("few words")
    given = str(tmp_path / validation) if "." in validation else validation
    code, text, err = run(
        "merge", "average", *adapters[:2], tmp_path / "m", "--base", tiny["llama"], "--validation", given, *SHORT
    )
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert not (tmp_path / "m").exists()


def test_adapters_without_a_base_are_refused(run: Run, adapters: list[Path], text_file: Path, tmp_path: Path) -> None:
    sources = []
    for adapter in adapters[:2]:
        config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
        sources.append(tmp_path / adapter.name)
        sources[-1].mkdir()
        (sources[-1] / "adapter_config.json").write_text(json.dumps(config))
        (sources[-1] / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes())
    code, _, err = run("merge", "average", *sources, tmp_path / "m", "--validation", text_file, *SHORT)
    assert (code, err.count("\n")) == (2, 1)
    assert "--base" in err
