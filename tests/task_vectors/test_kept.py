"""task_vectors/kept.py, task_vectors/merge_updates.py: embeddings, biases, copies of the base. Against stock peft, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft_space
import pytest
import torch
from conftest import Run
from safetensors.torch import load_file, save_file
from tiny_models import make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft
EMBEDDING = "base_model.model.model.embed_tokens"
COPY = f"{EMBEDDING}.base_layer.weight"
PLAIN = {"r": 2, "dtype": torch.float32, "style": "saved"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", peft_space.FAMILY, **peft_space.SIZES)


def made(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    found = peft_space.make(folder, base, PLAIN | config, seed)
    assert found is not None
    return found


def edit(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = {**load_file(folder / peft_space.WEIGHTS), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / peft_space.WEIGHTS)


def assert_is_the_mean(out: Path, sources: list[Path], base: Path) -> None:
    changes, found = [peft_space.stock_change(each, base) for each in sources], peft_space.stock_change(out, base)
    assert found.keys() == set().union(*changes)
    for name, change in found.items():
        expected = sum(each.get(name, torch.zeros_like(change)) for each in changes) / len(changes)
        torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


EMBEDDED = {"target_modules": ["q_proj", "embed_tokens"], "rank_pattern": {"embed_tokens": 4}}


@pytest.mark.parametrize(
    "configs",
    [
        (EMBEDDED, EMBEDDED | {"lora_alpha": 3, "use_rslora": True}),
        (EMBEDDED, {"target_modules": ["v_proj"]}),
        ({"target_modules": ["v_proj"]}, EMBEDDED),
        ({"target_modules": ["q_proj"], "lora_bias": True}, {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 2}),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, EMBEDDED | {"init_lora_weights": "pissa"}),
        ({"target_modules": ["lm_head", "q_proj"]}, EMBEDDED),
        (
            {"target_modules": ["q_proj"], "init_lora_weights": "olora"},
            {"target_modules": ["o_proj"], "init_lora_weights": "pissa"},
        ),
    ],
    ids=["embeddings", "one embedding", "other embedding", "bias", "pissa with embedding", "output layer", "olora and pissa"],
)
def test_a_merge_at_a_rank_has_every_part_of_the_updates(
    configs: tuple[dict[str, Any], ...], run: Run, base: Path, tmp_path: Path
) -> None:
    sources = [made(tmp_path / str(seed), base, seed, **config) for seed, config in enumerate(configs)]
    code, _, err = run("merge", "average", *sources, tmp_path / "out", "--rank", 12)
    assert code == 0, err
    assert_is_the_mean(tmp_path / "out", sources, base)


def test_ternary_sources_with_embeddings_merge_at_a_rank_as_their_expansions(run: Run, base: Path, tmp_path: Path) -> None:
    sources = [made(tmp_path / str(seed), base, seed, **EMBEDDED) for seed in range(2)]
    for number, each in enumerate(sources):
        assert run("quantize", "compeft", each, tmp_path / f"c{number}")[0] == 0
        assert run("expand", tmp_path / f"c{number}", tmp_path / f"e{number}")[0] == 0
    assert run("merge", "average", tmp_path / "c0", tmp_path / "c1", tmp_path / "out", "--rank", 12)[0] == 0
    assert_is_the_mean(tmp_path / "out", [tmp_path / "e0", tmp_path / "e1"], base)


@pytest.mark.parametrize("rank", [(), ("--rank", 4)])
def test_a_copy_of_the_base_is_kept_where_all_that_have_it_have_the_same(
    rank: tuple[object, ...], run: Run, base: Path, tmp_path: Path
) -> None:
    sources = [made(tmp_path / str(seed), base, seed, **EMBEDDED) for seed in range(2)]
    kept = load_file(sources[0] / peft_space.WEIGHTS)[COPY]
    without = Path(shutil.copytree(sources[1], tmp_path / "without"))
    edit(without, {COPY: None})
    for number, second in enumerate((sources[1], without)):
        code, _, err = run("merge", "average", sources[0], second, tmp_path / f"out{number}", *rank)
        assert code == 0, err
        assert torch.equal(load_file(tmp_path / f"out{number}" / peft_space.WEIGHTS)[COPY], kept)
    edit(sources[1], {COPY: kept + 1})
    code, _, err = run("merge", "average", *sources, tmp_path / "out", *rank)
    assert (code, err.count("\n")) == (2, 1)
    assert COPY in err
    assert str(sources[0]) in err
    assert str(sources[1]) in err


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_parts_that_cannot_be_merged_are_refused_by_name(
    config: dict[str, Any], said: str, run: Run, base: Path, tmp_path: Path
) -> None:
    sources = [made(tmp_path / str(seed), base, seed, target_modules=["q_proj"], **config) for seed in range(2)]
    for rank in ((), ("--rank", 4)):
        code, text, err = run("merge", "average", *sources, tmp_path / "out", *rank)
        assert (code, text, err.count("\n")) == (2, "", 1), err
        assert said in err or next(iter(config)) in err
    assert not (tmp_path / "out").exists()


def test_kinds_that_mean_different_things_are_not_merged_entry_by_entry(run: Run, base: Path, tmp_path: Path) -> None:
    sources = [made(tmp_path / str(seed), base, seed, target_modules=["q_proj"]) for seed in range(2)]
    config = sources[1] / "adapter_config.json"
    for change, said in (
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa"}, "--rank"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ):
        before = config.read_text()
        config.write_text(json.dumps(json.loads(before) | change))
        for command in (("average", *sources, tmp_path / "out"), ("similarity", *sources)):
            code, _, err = run("merge", *command)
            assert (code, err.count("\n")) == (2, 1), err
            assert str(config) in err
            assert said in err
        config.write_text(before)


def test_factors_that_start_from_the_base_need_it(run: Run, base: Path, tmp_path: Path) -> None:
    configs = {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}
    sources = [made(tmp_path / str(seed), base, seed, **configs) for seed in range(2)]
    for each in sources:
        path = each / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": ""}))
    code, _, err = run("merge", "average", *sources, tmp_path / "out", "--rank", 8)
    assert (code, err.count("\n")) == (2, 1)
    assert "--base" in err
    assert run("merge", "average", *sources, tmp_path / "out", "--rank", 8, "--base", base)[0] == 0
    assert_is_the_mean(tmp_path / "out", sources, base)


def test_sources_without_any_update_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    source = made(tmp_path / "a", base, 0, target_modules=["q_proj"])
    save_file({COPY: torch.zeros(3)}, source / peft_space.WEIGHTS)
    code, _, err = run("merge", "average", source, source, tmp_path / "out", "--rank", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert str(source) in err


def test_what_is_left_of_a_weight_is_not_kept_for_the_weight(run: Run, base: Path, tmp_path: Path) -> None:
    sources = [made(tmp_path / str(i), base, i, target_modules=["q_proj"], init_lora_weights="pissa") for i in range(2)]
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    edit(sources[0], {name: torch.zeros(32, 32)})
    code, _, err = run("merge", "average", *sources, tmp_path / "out", "--rank", 8)
    assert (code, err.count("\n")) == (2, 1)
    assert name in err


def test_experts_are_merged_at_the_scaling_that_stock_peft_gives_them(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    """The same factors once with alpha / rank, once with alpha / root of the rank: 1 / 3 and 1 / 3 ** 0.5."""
    sources = [tmp_path / "a", tmp_path / "b"]
    targets = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    assert peft_space.make(sources[0], tiny["mixtral"], PLAIN | targets | {"r": 3, "lora_alpha": 1}) is not None
    shutil.copytree(sources[0], sources[1])
    config = sources[1] / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_rslora": True}))
    assert run("merge", "average", *sources, tmp_path / "out")[0] == 0
    changes = [peft_space.stock_change(each, tiny["mixtral"]) for each in (*sources, tmp_path / "out")]
    assert changes[0]
    for name, change in changes[0].items():
        torch.testing.assert_close(changes[2][name], (change + changes[1][name]) / 2, atol=1e-5, rtol=1e-5)
    code, _, err = run("merge", "similarity", *sources)
    assert (code, err.count("\n")) == (2, 1)
    assert "target_parameters" in err
    config.write_text(json.dumps(json.loads(config.read_text()) | {"alpha_pattern": {"gate_up_proj": 2}}))
    code, _, err = run("merge", "average", *sources, tmp_path / "no")
    assert (code, err.count("\n")) == (2, 1)
    assert "alpha_pattern" in err
