"""models/initialised.py: an adapter on a model is what stock peft makes of it, or is refused. Property, oracle."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import peft_space
import pytest
import torch
from conftest import SMALL, Run
from hypothesis import HealthCheck, given, settings
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import make_model

from compresskit.errors import RequestError
from compresskit.machine.device import choose_device
from compresskit.models.load import open_model, with_adapter
from compresskit.models.meta import read_plain
from compresskit.models.ragged import load_stock

TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "model", peft_space.FAMILY, **peft_space.SIZES)


def edit_config(folder: Path, changes: dict[str, Any]) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def assert_is_as_in_stock_peft(folder: Path, base: Path) -> None:
    """The change of every linear that `evaluate --adapter` runs."""
    model, expected = with_adapter(open_model(base), folder), peft_space.stock_change(folder, base)
    assert {name for name in expected if name.endswith("weight")} <= {f"{name}.weight" for name in model.linears}
    for name in model.linears:
        change = read_plain(model, f"{name}.weight").double() - read_plain(open_model(base), f"{name}.weight").double()
        wanted = expected.get(f"{name}.weight", torch.zeros_like(change))
        torch.testing.assert_close(change, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(peft_space.PLAIN)
def test_plain_adapters_are_read_as_stock_peft_reads_them(base: Path, drawn: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = peft_space.make(Path(root, "adapter"), base, drawn)
        assert folder is not None
        assert_is_as_in_stock_peft(folder, base)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(peft_space.anything())
def test_what_is_accepted_of_all_adapters_is_what_stock_peft_makes_of_it(base: Path, drawn: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as root:
        folder = peft_space.make(Path(root, "adapter"), base, drawn)
        if folder is None:
            return
        try:
            with_adapter(open_model(base), folder)
        except RequestError as error:
            assert str(folder) in str(error)
            assert "\n" not in str(error)
        else:
            assert_is_as_in_stock_peft(folder, base)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize(
    "stated", [{}, {"use_rslora": True, "lora_alpha": 3}, {"rank_pattern": {r".*\.0\..*": 2}, "lora_alpha": 7}]
)
def test_factors_that_start_from_the_base_change_it_as_in_stock_peft(
    family: str, init: str, stated: dict[str, Any], tiny: dict[str, Path], tmp_path: Path
) -> None:
    drawn = {"r": 3, "target_modules": "all-linear", "init_lora_weights": init, "dtype": torch.float32, "style": "saved"}
    if (family, init) == ("gpt2", "olora"):  # peft cannot start OLoRA from transposed weights
        folder = peft_space.make(tmp_path / "adapter", tiny[family], drawn | stated | {"init_lora_weights": True})
        assert folder is not None
        edit_config(folder, {"init_lora_weights": init})
        with pytest.raises(RequestError, match="transposed"):
            with_adapter(open_model(tiny[family]), folder)
        return
    folder = peft_space.make(tmp_path / "adapter", tiny[family], drawn | stated)
    assert folder is not None
    if family != "gpt2":
        assert_is_as_in_stock_peft(folder, tiny[family])
        return
    model, expected = with_adapter(open_model(tiny[family]), folder), peft_space.stock_change(folder, tiny[family])
    for name in model.linears:
        change = read_plain(model, f"{name}.weight") - read_plain(open_model(tiny[family]), f"{name}.weight")
        torch.testing.assert_close(change, expected[f"{name}.weight"].T.float(), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "PiSSA"}, "does not know"),
        ({"init_lora_weights": 1}, "does not know"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, "scaling"),
        ({"use_dora": True}, "use_dora"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"kasa_config": {"beta": 0.1}}, "KaSA"),
        ({"use_qalora": True}, "use_qalora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"r": 5}, "rank"),
        ({"rank_pattern": {"q_proj": 1}}, "rank"),
        ({"r": "4"}, "whole number"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ],
)
def test_what_is_no_plain_update_is_refused_by_its_key(
    config: dict[str, Any], said: str, run: Run, base: Path, tmp_path: Path
) -> None:
    drawn = {"r": 4, "target_modules": ["q_proj"], "dtype": torch.float32, "style": "saved"}
    folder = peft_space.make(tmp_path / "adapter", base, drawn)
    assert folder is not None
    path = edit_config(folder, config)
    code, text, err = run("evaluate", base, "--adapter", folder)
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert str(path) in err
    assert said in err


def test_factors_that_start_from_low_bits_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    drawn = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "pissa", "dtype": torch.float32, "style": "saved"}
    folder = peft_space.make(tmp_path / "adapter", base, drawn)
    code, _, err = run("quantize", "rtn", base, tmp_path / "small", "--group-size", 16, *SMALL)
    assert code in (0, 3), err  # a random model may count as collapsed
    code, _, err = run("evaluate", tmp_path / "small", "--adapter", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "path_initial_model_for_weight_conversion" in err


@pytest.mark.parametrize("style", ["with another name", "without the prefix"])
def test_keys_that_stock_peft_passes_over_are_refused_by_name(style: str, run: Run, base: Path, tmp_path: Path) -> None:
    drawn = {"r": 4, "target_modules": ["q_proj"], "dtype": torch.float32, "style": style}
    folder = peft_space.make(tmp_path / "adapter", base, drawn)
    assert folder is not None
    assert peft_space.stock_change(folder, base) == {}
    for command in (("evaluate", base, "--adapter", folder), ("quantize", "compeft", folder, tmp_path / "c")):
        code, _, err = run(*command)
        assert (code, err.count("\n")) == (2, 1)
        assert "q_proj.lora_A" in err


def test_a_key_that_is_there_twice_is_refused(run: Run, base: Path, tmp_path: Path) -> None:
    drawn = {"r": 4, "target_modules": ["q_proj"], "dtype": torch.float32, "style": "saved"}
    folder = peft_space.make(tmp_path / "adapter", base, drawn)
    assert folder is not None
    tensors = load_file(folder / peft_space.WEIGHTS)
    again = {peft_space.STYLES["with the adapter's name"](name): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | again, folder / peft_space.WEIGHTS)
    code, _, err = run("evaluate", base, "--adapter", folder)
    assert (code, err.count("\n")) == (2, 1)
    assert "twice" in err


def test_factors_of_modules_that_are_not_targeted_are_refused(run: Run, base: Path, tmp_path: Path) -> None:
    drawn = {"r": 4, "target_modules": ["q_proj", "v_proj"], "dtype": torch.float32, "style": "saved"}
    folder = peft_space.make(tmp_path / "adapter", base, drawn)
    assert folder is not None
    for targets in (["q_proj"], r".*q_proj"):
        path = edit_config(folder, {"target_modules": targets})
        assert not any("v_proj" in name for name in peft_space.stock_change(folder, base))
        code, _, err = run("evaluate", base, "--adapter", folder)
        assert (code, err.count("\n")) == (2, 1)
        assert str(path) in err
        assert "v_proj" in err


@pytest.mark.parametrize("init", [True, "eva", "pissa", "olora"])
@pytest.mark.parametrize("style", peft_space.LOADED_STYLES)
def test_generations_run_the_model_that_stock_peft_makes(init: Any, style: str, base: Path, tmp_path: Path) -> None:
    drawn = {"r": 4, "target_modules": "all-linear", "init_lora_weights": init, "dtype": torch.float32, "style": style}
    folder = peft_space.make(tmp_path / "adapter", base, drawn)
    assert folder is not None
    network = load_stock(with_adapter(open_model(base), folder), choose_device("cpu", "float32", {"F32"}))
    with torch.no_grad():
        found = network(torch.arange(3, 20)[None]).logits
        expected = PeftModel.from_pretrained(peft_space.stock_model(base), folder)(torch.arange(3, 20)[None]).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
