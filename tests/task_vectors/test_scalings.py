"""task_vectors/scalings.py: adapters of different scalings are merged as what they do to the weights.

Oracle: the updates of the weights, written out as scaling * B @ A. Property: the order of the sources, and where a scaling is
written, change nothing.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from task_vectors.scaled_adapters import (
    CONFIGS,
    DOWN,
    DTYPES,
    EPSILON,
    PLAIN,
    QUERY,
    RANKS,
    SHAPES,
    Pair,
    assert_close,
    config_of,
    merged,
    random_factors,
    scaling,
    stored,
    updates,
    write,
)

from compresskit.formats.peft import CONFIG, WEIGHTS, factor_names
from compresskit.task_vectors.compeft import ComPEFT
from compresskit.task_vectors.compress import compress
from compresskit.task_vectors.expand import expand
from compresskit.task_vectors.merging.average import Average
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.merging.pcb import PCB
from compresskit.task_vectors.merging.task_arithmetic import TaskArithmetic
from compresskit.task_vectors.merging.ties import Ties
from compresskit.task_vectors.request import ExpandOptions, TernaryOptions

LINEAR: list[MergeMethod] = [Average(), TaskArithmetic(), Ties(density=1)]
"""Methods that follow a factor of all sources."""
METHODS = [*LINEAR, Ties(density=0.4), PCB(ratio=0.5)]


def combined(method: MergeMethod, rows: list[torch.Tensor]) -> torch.Tensor:
    """A merge at equal places of tensors that say all about the weights, slowly and in float64; ties without its trim."""
    stack = torch.stack(rows)
    if isinstance(method, Average):
        return stack.mean(dim=0)
    if isinstance(method, TaskArithmetic):
        return method.scaling * stack.sum(dim=0)
    agrees = stack * stack.sum(dim=0).sign() > 0
    return (stack * agrees).sum(dim=0) / agrees.sum(dim=0).clamp_min(1)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


TWICE = {
    "lora_alpha": ({}, {"lora_alpha": 8}),
    "alpha_pattern": ({}, {"lora_alpha": 1, "alpha_pattern": {"q_proj": 8, DOWN: 8}}),
    "use_rslora": ({"use_rslora": True}, {"use_rslora": True, "lora_alpha": 8}),
    "one by rank, one by its root": (
        {},
        {"use_rslora": True, "alpha_pattern": {"q_proj": 8 / 2**0.5, "down_proj": 8 / 3**0.5}},
    ),
}


@pytest.mark.parametrize("written", TWICE)
@pytest.mark.parametrize("rank", [None, 3])
def test_the_average_of_an_adapter_and_itself_at_twice_the_alpha_is_one_and_a_half_of_it(
    written: str, rank: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    factors = random_factors(0, dtype)
    sources = [write(tmp_path / str(i), factors, **config) for i, config in enumerate(TWICE[written])]
    expected = {name: 1.5 * update for name, update in updates(sources[0]).items()}
    for order in (sources, sources[::-1]):
        out = merged(Average(), order, rank)
        if rank is None:
            assert_close(out, expected, EPSILON[dtype])
            assert config_of(out) == config_of(order[0])
        else:
            tensors = load_file(out / WEIGHTS)
            for name in SHAPES:
                a, b = (tensors[each].double() for each in factor_names(name))
                assert (b @ a - expected[name]).norm() <= EPSILON[dtype] * expected[name].norm()


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(CONFIGS, DTYPES), min_size=2, max_size=3), st.sampled_from(LINEAR), st.data())
def test_factors_are_merged_as_what_they_do_to_the_weights(
    stated: list[tuple[dict[str, Any], torch.dtype]], method: MergeMethod, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as root:
        sources = [write(Path(root, str(i)), random_factors(i, dtype), **config) for i, (config, dtype) in enumerate(stated)]
        expected = {}
        for name in SHAPES:
            pairs = [stored(each)[name] for each in sources]
            scales = [scaling(name, config_of(each)) for each in sources]
            first = combined(method, [a for a, _ in pairs])
            expected[name] = combined(method, [s * b for s, (_, b) in zip(scales, pairs, strict=True)]) @ first
        order = data.draw(st.permutations(sources))
        out = merged(method, order)
        assert_close(out, expected, EPSILON[stated[sources.index(order[0])][1]], stated)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS, CONFIGS, DTYPES, st.sampled_from(METHODS), st.integers(0, 1000))
def test_the_order_of_the_sources_changes_nothing(
    first: dict[str, Any], second: dict[str, Any], dtype: torch.dtype, method: MergeMethod, seed: int
) -> None:
    with tempfile.TemporaryDirectory() as root:
        sources = [
            write(Path(root, str(i)), random_factors(seed + i, dtype), **config) for i, config in enumerate([first, second])
        ]
        assert_close(merged(method, sources), updates(merged(method, sources[::-1])), EPSILON[dtype])


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS, CONFIGS, st.sampled_from([*LINEAR, PCB(ratio=0.5)]))
def test_scalings_moved_into_the_second_factors_give_the_same(
    first: dict[str, Any], second: dict[str, Any], method: MergeMethod
) -> None:
    """The same two adapters, written again at the larger of their scalings."""
    configs = [first, second]
    with tempfile.TemporaryDirectory() as root:
        sources = [write(Path(root, str(i)), random_factors(i), **config) for i, config in enumerate(configs)]
        largest = {name: max((scaling(name, config) for config in configs), key=abs) for name in SHAPES}
        alphas, same = {name: largest[name] * RANKS[name] for name in SHAPES}, []
        for i, config in enumerate(configs):
            moved = {n: (a, scaling(n, config) / largest[n] * b) for n, (a, b) in random_factors(i).items()}
            same.append(write(Path(root, f"same{i}"), moved, alpha_pattern=alphas))
        assert_close(merged(method, sources), updates(merged(method, same)), EPSILON[torch.float32])


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(CONFIGS, CONFIGS)
def test_ties_keeps_of_each_source_what_it_would_keep_beside_any_other(first: dict[str, Any], second: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folders, configs = [Path(root, str(i)) for i in range(4)], [first, second] * 2
        pairs = [random_factors(0), random_factors(1)]
        pairs += [trimmed(each, 0.4) for each in pairs]
        sources = [write(folder, each, **config) for folder, each, config in zip(folders, pairs, configs, strict=True)]
        trims, keeps = merged(Ties(density=0.4), sources[:2]), merged(Ties(density=1), sources[2:])
        assert_close(trims, updates(keeps), EPSILON[torch.float32])


def trimmed(factors: dict[str, Pair], density: float) -> dict[str, Pair]:
    """The share of largest entries over all factors."""
    sizes = torch.cat([t.flatten().abs() for pair in factors.values() for t in pair]).sort(descending=True).values
    least = sizes[round(density * len(sizes)) - 1]
    return {name: (a * (a.abs() >= least), b * (b.abs() >= least)) for name, (a, b) in factors.items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_sources_of_one_scaling_merge_as_they_are_stored_however_it_is_written(method: MergeMethod, tmp_path: Path) -> None:
    written = [{"lora_alpha": 4}, {"lora_alpha": 1, "alpha_pattern": {"q_proj": 4, DOWN: 4}}]
    written.append({"use_rslora": True, "alpha_pattern": {"q_proj": 4 / 2**0.5, DOWN: 4 / 3**0.5}})
    sources = [write(tmp_path / str(i), random_factors(i), **config) for i, config in enumerate(written)]
    found = load_file(merged(method, sources) / WEIGHTS)
    plain = [write(tmp_path / f"plain{i}", random_factors(i)) for i in range(3)]
    expected = load_file(merged(method, plain) / WEIGHTS)
    assert all(torch.equal(found[name], expected[name]) for name in found)
    tensors = [load_file(each / WEIGHTS) for each in sources]
    if method.trims_to == 1 and not method.whole:
        for name in found:
            rows = np.stack([each[name].numpy().reshape(-1) for each in tensors])
            values = method.merge(rows, np.ones(3, np.float32)) * np.float32(method.scaling)
            assert np.array_equal(found[name].numpy().reshape(-1), values)


@pytest.mark.parametrize("variant", ["compeft", "prune"])
@pytest.mark.parametrize("method", [*LINEAR, PCB(ratio=0.5)], ids=lambda method: type(method).__name__)
def test_the_scaling_that_a_ternary_source_states_is_part_of_its_vector(
    method: MergeMethod, variant: Any, tmp_path: Path
) -> None:
    ternary, expanded = [], []
    for i, config in enumerate([{}, {"lora_alpha": 9}, {"use_rslora": True, "alpha_pattern": {"q_proj": 2}}]):
        source = write(tmp_path / f"a{i}", random_factors(i), **config)
        ternary.append(tmp_path / f"c{i}")
        expanded.append(tmp_path / f"e{i}")
        compress(ComPEFT(balance=False, density=0.5, variant=variant), str(source), ternary[i], TernaryOptions())
        expand(str(ternary[i]), expanded[i], ExpandOptions())
    exact, floats, mixed = (load_file(merged(method, s) / WEIGHTS) for s in (ternary, expanded, [ternary[0], *expanded[1:]]))
    assert all(torch.equal(exact[name], floats[name]) and torch.equal(exact[name], mixed[name]) for name in exact)
    assert_close(merged(method, ternary[::-1]), updates(merged(method, expanded)), EPSILON[torch.float32])
    if isinstance(method, Average):
        mean = {name: [torch.stack([stored(e)[name][0] for e in expanded]).mean(dim=0)] for name in SHAPES}
        for name in SHAPES:
            mean[name].append(torch.stack([scaling(name, config_of(e)) * stored(e)[name][1] for e in expanded]).mean(dim=0))
        assert_close(merged(method, ternary), {name: b @ a for name, (a, b) in mean.items()}, EPSILON[torch.float32])


def test_what_the_first_source_s_configuration_cannot_say_is_refused_with_one_line(run: Run, tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i), lora_alpha=alpha) for i, alpha in enumerate([0, 4])]
    code, text, err = run("merge", "average", *sources, tmp_path / "out")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in (str(sources[0] / CONFIG), "_proj", "--rank"))
    assert run("merge", "average", *sources[::-1], tmp_path / "zero last")[0] == 0
    assert run("merge", "average", sources[0], sources[0], tmp_path / "zeros")[0] == 0
    half = [write(tmp_path / f"h{i}", random_factors(i, torch.float16), lora_alpha=alpha) for i, alpha in enumerate([1, 1e6])]
    code, text, err = run("merge", "average", *half, tmp_path / "out")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in (str(half[0] / CONFIG), "_proj", "F16", "--rank"))
    assert run("merge", "average", *half, tmp_path / "ranked", "--rank", 4)[0] == 0
    assert not (tmp_path / "out").exists()
    texts = [sources[1], write(tmp_path / "text", random_factors(2), lora_alpha="4")]
    for command in (("average", *texts, tmp_path / "out"), ("similarity", *texts)):
        code, _, err = run("merge", *command)
        assert (code, err.count("\n")) == (2, 1)
        assert str(tmp_path / "text" / CONFIG) in err


def test_factors_without_a_partner_and_of_embeddings_are_never_dropped(run: Run, tmp_path: Path) -> None:
    sources = [write(tmp_path / str(i), random_factors(i)) for i in range(2)]
    lone, embedding = (Path(shutil.copytree(sources[0], tmp_path / name)) for name in ("lone", "embedding"))
    tensors = load_file(lone / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if n != factor_names(QUERY)[0]}, lone / WEIGHTS)
    for command in (("average", lone, lone), ("average", lone, sources[1], "--rank", 2), ("similarity", lone, lone)):
        out = () if command[0] == "similarity" else (tmp_path / "out",)
        code, _, err = run("merge", *command[:3], *out, *command[3:])
        assert (code, err.count("\n")) == (2, 1), err
        assert factor_names(QUERY)[1] in err
    names = [f"base_model.model.model.embed_tokens.lora_embedding_{side}" for side in "AB"]
    save_file(tensors | {names[0]: torch.ones(2, 9), names[1]: torch.ones(5, 2)}, embedding / WEIGHTS)
    code, _, err = run("merge", "average", embedding, sources[1], tmp_path / "out")
    assert (code, err.count("\n")) == (2, 1)
    assert "target_modules does not mean model.embed_tokens" in err
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    (embedding / CONFIG).write_text(json.dumps(PLAIN | targets))
    assert run("merge", "average", embedding, sources[1], tmp_path / "ranked", "--rank", 2)[0] == 0
    found = load_file(tmp_path / "ranked" / WEIGHTS)
    torch.testing.assert_close(found[names[1]] @ found[names[0]], torch.full((5, 9), 2.0))  # half of 4 / 2 times 2
    doubled = Path(shutil.copytree(embedding, tmp_path / "doubled"))
    (doubled / CONFIG).write_text(json.dumps(PLAIN | targets | {"lora_alpha": 8}))
    assert run("merge", "average", doubled, embedding, tmp_path / "both")[0] == 0
    found = load_file(tmp_path / "both" / WEIGHTS)
    assert torch.equal(found[names[1]], torch.full((5, 2), 0.75))
    assert torch.equal(found[names[0]], torch.ones(2, 9))
