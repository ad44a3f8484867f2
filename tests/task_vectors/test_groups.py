"""task_vectors/pairs.py, task_vectors/compress.py: groups with their own scale, balanced pairs. Oracle, end to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft_space
import pytest
import torch
from conftest import Run
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from stock_adapters import make_adapter
from tiny_models import make_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft
SIDES = [f"base_model.model.model.embed_tokens.lora_embedding_{side}" for side in "AB"]
COPY = "base_model.model.model.embed_tokens.base_layer.weight"
DRAWN = {"r": 4, "dtype": torch.float32, "style": "saved"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", peft_space.FAMILY, **peft_space.SIZES)


@pytest.fixture(scope="module")
def embedded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of linears and the embedding, whose B starts from N(0, 1)."""
    folder = tmp_path_factory.mktemp("embedded") / "adapter"
    found = peft_space.make(folder, base, DRAWN | {"target_modules": ["q_proj", "down_proj", "embed_tokens"]})
    assert found is not None
    return found


def expanded(run: Run, source: Path, out: Path, *flags: object) -> dict[str, torch.Tensor]:
    code, _, err = run("quantize", "compeft", source, out / "small", *flags)
    assert code == 0, err
    assert run("expand", out / "small", out / "expanded")[0] == 0
    return load_file(out / "expanded" / peft_space.WEIGHTS)


@pytest.mark.parametrize("flags", [(), ("--no-balance",), ("--variant", "stc", "--density", "0.4"), ("--variant", "prune")])
def test_what_becomes_of_linears_does_not_depend_on_an_embedding(
    flags: tuple[str, ...], run: Run, embedded: Path, tmp_path: Path
) -> None:
    alone = Path(shutil.copytree(embedded, tmp_path / "alone"))
    tensors = load_file(embedded / peft_space.WEIGHTS)
    assert float(tensors[SIDES[1]].std()) > 0.8  # the noise of which the scale must not be made
    save_file({n: t for n, t in tensors.items() if "embed" not in n}, alone / peft_space.WEIGHTS)
    found, expected = (expanded(run, each, tmp_path / f"of {each.name}", *flags) for each in (embedded, alone))
    assert {name for name in found if "embed" not in name} == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(found[COPY], tensors[COPY])


@pytest.mark.parametrize("balance", [True, False])
def test_embeddings_have_the_scale_of_their_own_entries(balance: bool, run: Run, embedded: Path, tmp_path: Path) -> None:
    tensors = load_file(embedded / peft_space.WEIGHTS)
    pair = [tensors[name].double() for name in SIDES]
    if balance:  # written differently: the singular parts, then equal root mean squares
        u, values, vh = torch.linalg.svd(pair[1] @ pair[0], full_matrices=False)
        pair = [values[:4].sqrt()[:, None] * vh[:4], u[:, :4] * values[:4].sqrt()]
        pair = [each / each.square().mean().sqrt() for each in pair]
        scale = values[:4].sum().sqrt() / (pair[0].norm() * pair[1].norm()).sqrt()
        pair = [scale * each for each in pair]
    found = expanded(run, embedded, tmp_path, "--density", "0.3", *(() if balance else ("--no-balance",)))
    flat = torch.cat([each.flatten() for each in pair])
    least = flat.abs().sort(descending=True).values[round(0.3 * len(flat)) - 1]
    for name, each in zip(SIDES, pair, strict=True):
        expected = flat.std(correction=0) * (each.abs() >= least)
        # The mean of the entries, a small part of the scale, depends on the signs of the singular vectors.
        torch.testing.assert_close(found[name].double().abs(), expected, rtol=1e-3, atol=1e-7)


def test_cosines_of_ternary_vectors_count_the_scales_of_their_groups(
    run: Run, base: Path, embedded: Path, tmp_path: Path
) -> None:
    targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    second = peft_space.make(tmp_path / "second", base, DRAWN | targets, 1)
    assert second is not None
    flat = []
    for number, source in enumerate((embedded, second)):
        tensors = expanded(run, source, tmp_path / str(number), "--no-balance")
        flat.append(torch.cat([tensors[name].flatten().double() for name in sorted(tensors) if name != COPY]))
    code, text, err = run("merge", "similarity", tmp_path / "0/small", tmp_path / "1/small", "--json")
    assert code == 0, err
    expected = float(flat[0] @ flat[1] / (flat[0].norm() * flat[1].norm()))
    assert abs(json.loads(text)["similarity"][0][1] - expected) < 1e-6


@pytest.mark.parametrize("kind", ["saved", "lora"])
def test_a_file_that_is_mostly_left_as_it_is_says_so(kind: str, run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter", kind)
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "c", "--json")
    assert code == 0, err
    notes = json.loads(text).get("notes", [])
    assert len(notes) == (kind == "saved")
    assert all("lm_head" in note and note in err for note in notes)


def test_a_copy_of_the_base_is_said_with_the_way_to_leave_it_out(run: Run, embedded: Path, tmp_path: Path) -> None:
    code, _, err = run("quantize", "compeft", embedded, tmp_path / "c")
    assert code == 0
    assert COPY in err
    assert "save_embedding_layers=False" in err


def test_factors_of_experts_are_balanced_expert_by_expert(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    network = get_peft_model(
        peft_space.stock_model(tiny["mixtral"]),
        LoraConfig(r=3, target_modules=["q_proj"], target_parameters=experts, task_type="CAUSAL_LM"),
    )
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "adapter")
    found = expanded(run, tmp_path / "adapter", tmp_path, "--density", "1", "--variant", "prune")
    before = load_file(tmp_path / "adapter" / peft_space.WEIGHTS)
    assert any("experts" in name and not torch.allclose(found[name], before[name]) for name in before)  # balanced
    changes = []
    for folder in (tmp_path / "adapter", tmp_path / "expanded"):
        loaded = PeftModel.from_pretrained(peft_space.stock_model(tiny["mixtral"]), folder).merge_and_unload().state_dict()
        changes.append(loaded)
    for name, tensor in changes[0].items():
        torch.testing.assert_close(changes[1][name], tensor, atol=1e-5, rtol=1e-5)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rank_pattern": {"q_proj": 3}}))
    code, _, err = run("quantize", "compeft", tmp_path / "adapter", tmp_path / "c")
    assert (code, err.count("\n")) == (2, 1)
    assert "--no-balance" in err
    assert run("quantize", "compeft", tmp_path / "adapter", tmp_path / "c", "--no-balance")[0] == 0


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4", "corda"])
def test_factors_that_start_from_the_base_are_refused(init: str, run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": init}))
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "c")
    assert (code, text, err.count("\n")) == (2, "", 1)
    assert str(config) in err
    assert "path_initial_model_for_weight_conversion" in err
    assert not (tmp_path / "c").exists()


def test_alpha_is_picked_for_plain_adapters_of_linears_alone(
    run: Run, base: Path, embedded: Path, text_file: Path, tmp_path: Path
) -> None:
    code, _, err = run(
        "quantize", "compeft", embedded, tmp_path / "c", "--alpha", "auto", "--validation", text_file, "--base", base
    )
    assert (code, err.count("\n")) == (2, 1)
    assert "embed_tokens" in err
