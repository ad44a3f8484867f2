"""quantization/formatted.py and quantization/format_checks.py: every format end to end, opened by stock tools; refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from safetensors.torch import load_file
from stock_tools import run_stock, stock_logits, tokens, walked_logits
from tiny_models import make_model

from compresskit.checkpoint.writer import Writer
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.formats.fixed import SCHEMES
from compresskit.models.load import open_model
from compresskit.numerics.float_grid import nearest_e4m3
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.rtn import RTN
from compresskit.report.inspect import inspect
from compresskit.stages import Options

Make = Callable[[Any, Path, Path], dict[str, Any]]
STORED_BITS = {"fp8": 8.25, "fp8-block": 8.002, "int8": 8.25, "nvfp4": 4.503, "mxfp4": 4.25}
"""Of hidden size 128 and width 256, with scales in 32 bits: (32 / 128 or 32 / 256 for one in four linears) and so on."""
EMULATED = """
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM
tokens = torch.load(arguments[0])
for folder in arguments[1:]:
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "dequantize": False}
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    with torch.no_grad():
        torch.save(model(tokens).logits, folder + ".emulated")
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose sides are whole blocks of 128."""
    folder = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    return make_model(folder / "dense", "llama", **sizes, num_key_value_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def results(wide: Path, make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """(folder, result) of every format by rtn and gptq."""
    root = tmp_path_factory.mktemp("formats")
    methods = {f"{kind.__name__}-{name}": kind(format=name) for kind in (RTN, GPTQ) for name in SCHEMES}  # type: ignore[arg-type]
    return {name: (root / name, make(method, wide, root / name)) for name, method in methods.items()}


def test_stock_transformers_loads_every_format_to_our_logits(results: Any, tmp_path: Path) -> None:
    folders = [folder for name, (folder, _) in results.items() if name.startswith("GPTQ") or name in ("RTN-fp8", "RTN-nvfp4")]
    for folder, stock in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert float((stock - walked_logits(folder)).abs().max()) < 1e-3, folder.name


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    """Activations (..., features) as the formats with 8 bits round them, written out."""
    parts = x.unflatten(-1, (-1, 128)) if name == "fp8-block" else x.unsqueeze(-2)
    scale = parts.abs().amax(dim=-1, keepdim=True) / (127.5 if name == "int8" else 448)
    codes = (parts / scale).clamp(-128, 127).round() if name == "int8" else nearest_e4m3(parts / scale)
    return (codes * scale).flatten(-2)


@pytest.mark.parametrize("name", ["fp8", "int8", "fp8-block"])
def test_the_library_s_emulation_rounds_activations_as_stated(name: str, results: Any, tmp_path: Path) -> None:
    folder, _ = results[f"RTN-{name}"]
    torch.save(tokens(), tmp_path / "tokens.pt")
    run_stock(EMULATED, [str(tmp_path / "tokens.pt"), str(folder)], tmp_path)
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for module in network.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args: (rounded(args[0], name), *args[1:]))
    with torch.no_grad():
        expected = network(tokens()).logits
    emulated = torch.load(f"{folder}.emulated")
    assert float((emulated - expected).abs().max()) < 1e-3
    assert float((emulated - walked_logits(folder)).abs().max()) > 1e-3


def test_sizes_bits_and_facts_are_those_on_disk(results: Any, wide: Path, text_file: Path) -> None:
    for name, (folder, result) in results.items():
        kind, _, form = name.partition("-")
        method = (RTN if kind == "RTN" else GPTQ)(format=form)  # type: ignore[arg-type]
        request = QuantizeRequest(method, open_model(wide), folder, Options(calibration=str(text_file)))
        assert request.outputs().bytes(10**10) == (folder / "model.safetensors").stat().st_size == result["bytes_after"]
        assert abs(result["bits_per_weight"] - STORED_BITS[form]) < 0.1
        manifest = json.loads((folder / "compresskit.json").read_text())
        assert manifest["settings"]["format"] == form and manifest["settings"]["bits"] == SCHEMES[form].bits
        assert manifest["settings"]["activations"] == ("dynamic" if SCHEMES[form].bits == 8 else "none")
        assert result["kl_held_back"] < 0.1


def test_our_own_stages_read_every_format(results: Any, wide: Path, text_file: Path) -> None:
    for name in ("RTN-fp8", "GPTQ-int8", "RTN-nvfp4", "GPTQ-mxfp4"):
        folder, _ = results[name]
        found = inspect(str(folder))
        assert found.get("stored_as", "").startswith("FP8") if "fp8" in name else found["low_bit"]["linears"] == 14
        options = EvaluateOptions(against=str(wide), data=str(text_file), windows=2, sequence_length=64)
        assert evaluate(str(folder), options, quiet=True)["kl"] < 0.1


def test_gptq_is_nearer_to_the_outputs_than_rounding_to_nearest(results: Any) -> None:
    for name in ("nvfp4", "mxfp4"):
        assert results[f"GPTQ-{name}"][1]["kl_held_back"] < results[f"RTN-{name}"][1]["kl_held_back"] * 1.1


def test_linears_that_vllm_joins_share_nvfp4_s_divisor(results: Any) -> None:
    tensors = load_file(results["RTN-nvfp4"][0] / "model.safetensors")
    names = [f"model.layers.0.self_attn.{part}_proj.weight_global_scale" for part in "qkv"]
    assert len({float(tensors[name]) for name in names}) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "fp8", "bits": 4}, "--bits 4: fp8 fixes its bits"),
        ({"format": "nvfp4", "symmetric": False}, "--asymmetric: nvfp4 fixes"),
        ({"format": "mxfp4", "group_size": 32}, "--group-size 32: mxfp4 fixes"),
        ({"format": "int8", "clipping": "error"}, "--clipping error: int8 fixes"),
        ({"activations": "dynamic"}, "pass another --format"),
        ({"format": "mxfp4", "activations": "static"}, "mxfp4 has none or dynamic"),
        ({"format": "fp8-block"}, r"q_proj has 32 outputs, which do not divide into blocks of 128; pass another"),
    ],
)
def test_what_a_format_fixes_is_refused(settings: dict[str, Any], said: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    request = QuantizeRequest(RTN(**settings), open_model(tiny["llama"]), tmp_path / "out", Options())
    with pytest.raises(RequestError, match=said):
        request.check()


def test_experts_come_packed_only(tiny: dict[str, Path], tmp_path: Path) -> None:
    request = QuantizeRequest(RTN(format="fp8"), open_model(tiny["mixtral"]), tmp_path / "out", Options())
    with pytest.raises(UnsupportedArchitecture, match="experts of --format packed only"):
        request.check()


@pytest.mark.parametrize(
    "flags",
    [
        ("--format", "int8", "--smoothing", 0.5),
        ("--format", "fp8", "--activations", "static", "--kv-cache", "fp8"),
        ("--format", "nvfp4", "--activations", "dynamic"),
    ],
    ids=lambda flags: flags[1],
)
def test_a_resumed_run_gives_the_bytes_of_an_undisturbed_one(
    flags: tuple[Any, ...], run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Writer.finish_block

    def interrupted(writer: Writer, index: int, facts: dict[str, Any]) -> None:
        finish(writer, index, facts)
        if index == 1:
            raise KeyboardInterrupt

    given = ("--calibration", text_file, "--samples", 4, "--sequence-length", 64, *flags)
    command = ("quantize", "gptq", tiny["llama"])
    with monkeypatch.context() as patch:
        patch.setattr(Writer, "finish_block", interrupted)
        assert run(*command, tmp_path / "twice", *given)[0] == 130
    assert run(*command, tmp_path / "twice", *given, "--resume")[0] == 0
    assert run(*command, tmp_path / "once", *given)[0] == 0
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert found[0] == found[1]
