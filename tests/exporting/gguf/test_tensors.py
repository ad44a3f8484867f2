"""exporting/gguf/tensors.py: weights in the file, against stock readers of both sides. Oracle, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import families
import family_stages
import pytest
import torch
from conftest import SMALL, Run
from gguf_files import keys_of, kinds_of, stock_logits, tensors_of
from safetensors.torch import load_file, save_file
from stored_models import store_fp8
from tiny_models import FAMILIES as TINY_FAMILIES
from tiny_models import TINY_CONFIGS, make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.stock import quiet
from compresskit.exporting.gguf.families import FAMILIES
from compresskit.machine.device import Where
from compresskit.models.load import open_any
from compresskit.models.ragged import load_stock

TOKENS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(0))
BUILT_IN = {family: {"query_pre_attn_scalar": 8} for family in ("gemma2", "gemma3_text")}
PARTS = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}


def tiny_of(family: str, folder: Path) -> Path:
    if family in TINY_CONFIGS:
        return make_model(folder, family, **BUILT_IN.get(family, {}))
    families.build(family, folder)
    family_stages.write_tokenizer(folder)
    return folder


def logits_of(folder: Path) -> Tensor:
    network = load_stock(open_any(str(folder)), Where(torch.device("cpu"), torch.float32, False))
    with torch.no_grad():
        logits: Tensor = network(TOKENS).logits
    return logits


def in_own_order(rows: Tensor, heads: int) -> Tensor:
    """Rows of neighbouring channels back in transformers' order: even ones first."""
    per_head = rows.view(heads, -1, *rows.shape[1:])
    return torch.cat([per_head[:, 0::2], per_head[:, 1::2]], dim=1).flatten(0, 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_stock_transformers_computes_the_same_from_the_file(family: str, tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    assert run("export", "gguf", tiny[family], tmp_path / "m.gguf")[0] == 0
    assert torch.equal(stock_logits(tmp_path / "m.gguf", TOKENS), logits_of(tiny[family]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_every_value_of_every_family(family: str, tmp_path: Path, run: Run) -> None:
    source = tiny_of(family, tmp_path / "model")
    code, out, _ = run("export", "gguf", source, tmp_path / "m.gguf", "--json")
    assert code == 0
    found = tensors_of(tmp_path / "m.gguf")
    with quiet():
        stored = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    values = sum(tensor.numel() for tensor in stored.parameters())
    assert sum(tensor.numel() for tensor in found.values()) == values == json.loads(out)["parameters_after"]
    offset = 1.0 if family.startswith(("gemma", "nemotron")) else 0.0
    wanted = sum(
        float(each.detach().double().sum()) + (offset * each.numel() if name.endswith("norm.weight") else 0.0)
        for name, each in stored.named_parameters()
    )
    assert sum(float(tensor.double().sum()) for tensor in found.values()) == pytest.approx(wanted, rel=1e-7)  # 1 + w is rounded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "kinds"), [(2, "Q4_0 Q4_0"), (3, "Q4_0 Q4_0"), (4, "Q4_0 Q5_0"), (8, "Q8_0 Q8_0")])
def test_codes_are_carried_bit_for_bit(
    bits: int, kinds: str, symmetric: bool, tiny: dict[str, Path], tmp_path: Path, run: Run, text_file: Path
) -> None:
    flags = ("--bits", bits, "--group-size", 32, "--symmetric" if symmetric else "--asymmetric", "--calibration", text_file)
    assert run("quantize", "rtn", tiny["llama"], tmp_path / "low", *flags, *SMALL)[0] in (0, 3)
    code, out, _ = run("export", "gguf", tmp_path / "low", tmp_path / "m.gguf", "--json")
    assert code == 0
    result = json.loads(out)
    kind = kinds.split()[not symmetric]
    assert result["tensor_types"][kind] == 21
    carried = symmetric or bits != 8
    assert result["exact"] == carried
    found, model = tensors_of(tmp_path / "m.gguf"), open_any(str(tmp_path / "low"))
    assert model.format is not None
    for block in range(model.block_count):
        for name in model.block_linears(block):
            short = next((key for key, own in PARTS.items() if name.endswith(own)), None)
            if short is None:
                continue
            theirs = found[f"blk.{block}.{short}.weight"]
            theirs = in_own_order(theirs, {"attn_q": 4, "attn_k": 2}[short]) if short in ("attn_q", "attn_k") else theirs
            ours = model.format.read(name)
            if carried:
                assert torch.equal(theirs.to(ours.dtype), ours)
            else:
                assert (
                    0
                    < float((theirs - ours.float()).norm() / ours.float().norm())
                    == pytest.approx(result["rounding_errors"][f"blk.{block}.{short}.weight"], rel=1e-4)
                )


@pytest.fixture(scope="module")
def ragged(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models of a family with another width in every block."""
    from compresskit.api import stage

    root = tmp_path_factory.mktemp("ragged")

    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            settings = {"sparsity": 0.3, "allocation": "global", "round_to": 1, "calibration": "builtin", "samples": 2}
            stage("prune", tiny[family], root / family, "magnitude", True, {**settings, "sequence_length": 32})
            self[family] = root / family
            return self[family]

    return Models()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_each_block_keeps_its_own_width_where_llama_cpp_can_run_that(
    family: str, ragged: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    assert run("export", "gguf", ragged[family], tmp_path / "m.gguf")[0] == 0
    blocks = json.loads((ragged[family] / "config.json").read_text())["block_configs"]
    widths = [block["ffn"]["intermediate_size"] for block in blocks]
    keys, found = keys_of(tmp_path / "m.gguf"), tensors_of(tmp_path / "m.gguf")
    assert len(set(widths)) > 1
    assert keys["general.architecture"] == "deci"
    assert keys["deci.feed_forward_length"] == widths
    assert keys["deci.attention.head_count"] == [4, 4, 4]
    assert keys["deci.attention.head_count_kv"] == [2, 2, 2]
    assert [found[f"blk.{index}.ffn_down.weight"].shape[1] for index in range(3)] == widths


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_other_families_are_padded_to_the_widest_and_compute_the_same(
    family: str, ragged: dict[str, Path], tmp_path: Path, run: Run
) -> None:
    assert run("export", "gguf", ragged[family], tmp_path / "m.gguf")[0] == 0
    assert torch.allclose(stock_logits(tmp_path / "m.gguf", TOKENS), logits_of(ragged[family]), atol=1e-5)


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_padded_as_weights_are(
    symmetric: bool, tiny: dict[str, Path], tmp_path: Path, run: Run, text_file: Path
) -> None:
    text, flag = ("--calibration", text_file, *SMALL), "--symmetric" if symmetric else "--asymmetric"
    pruned, low, file = tmp_path / "pruned", tmp_path / "low", tmp_path / "m.gguf"
    shape = ("--sparsity", 0.4, "--allocation", "global", "--round-to", 32)
    assert run("prune", "magnitude", tiny["qwen2"], pruned, *shape, *text)[0] == 0
    assert len({group.width for index in range(3) for group in open_any(str(pruned)).ffn_groups(index)}) > 1
    assert run("quantize", "rtn", pruned, low, "--bits", 4, "--group-size", 32, flag, *text)[0] in (0, 3)
    code, out, _ = run("export", "gguf", low, file, "--json")
    assert code == 0
    assert json.loads(out)["exact"]
    assert len({tensor.shape for name, tensor in tensors_of(file).items() if name.endswith("ffn_up.weight")}) == 1
    assert torch.allclose(stock_logits(file, TOKENS), logits_of(low), atol=0.02)  # readers round products to the scale's dtype


def test_files_in_float8_become_the_weights_that_they_stand_for(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    for name, folder in zip(("fp8", "dense"), store_fp8(tiny["llama"], "blocks", tmp_path), strict=True):
        assert run("export", "gguf", folder, tmp_path / f"{name}.gguf")[0] == 0
    stored, meant = (tensors_of(tmp_path / f"{name}.gguf") for name in ("fp8", "dense"))
    assert kinds_of(tmp_path / "fp8.gguf")["blk.0.attn_q.weight"] == "BF16"
    assert stored.keys() == meant.keys()
    assert all(torch.equal(stored[name], meant[name]) for name in meant)


def test_a_codebook_is_rounded_to_8_bits(tiny: dict[str, Path], tmp_path: Path, run: Run, text_file: Path) -> None:
    assert run("quantize", "nf4", tiny["llama"], tmp_path / "low", "--calibration", text_file, *SMALL)[0] in (0, 3)
    code, out, _ = run("export", "gguf", tmp_path / "low", tmp_path / "m.gguf", "--json")
    assert code == 0
    result = json.loads(out)
    assert (result["exact"], result["tensor_types"]["Q8_0"]) == (False, 21)
    assert 0 < result["largest_rounding_error"] < 0.01


def test_types_of_dense_weights_are_chosen_and_their_loss_is_told(tiny: dict[str, Path], tmp_path: Path, run: Run) -> None:
    code, out, err = run(
        "export", "gguf", tiny["llama"], tmp_path / "m.gguf", "--json", "--weights", "q8_0", "--embedding", "f16"
    )
    assert code == 0
    kinds = kinds_of(tmp_path / "m.gguf")
    assert {kinds["token_embd.weight"], kinds["output.weight"]} == {"F16"}
    assert {kind for name, kind in kinds.items() if name.endswith(("attn_q.weight", "ffn_up.weight"))} == {"Q8_0"}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    result = json.loads(out)
    assert 1e-4 < result["largest_rounding_error"] < 0.01
    assert len(result["rounding_errors"]) == 23
    assert "23 tensors were rounded" in err


def test_weights_beyond_half_precision_are_no_infinity_in_the_file(tmp_path: Path, run: Run) -> None:
    source = make_model(tmp_path / "model", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    code, _, err = run("export", "gguf", source, tmp_path / "m.gguf", "--weights", "f16")
    assert code == 1
    assert "holds 1e+06, which F16 cannot; pass --weights f32" in err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tied_head_is_stored_once_and_an_own_one_is_kept(tmp_path: Path, run: Run) -> None:
    for tied in (True, False):
        source = make_model(tmp_path / f"{tied}", "qwen3", tie_word_embeddings=tied)
        assert run("export", "gguf", source, tmp_path / f"{tied}.gguf")[0] == 0
        assert ("output.weight" in kinds_of(tmp_path / f"{tied}.gguf")) is not tied


def test_families_without_a_row_are_refused() -> None:
    assert set(TINY_FAMILIES) - FAMILIES.keys() == {"opt", "gpt_neox", "mixtral", "qwen2_moe", "qwen3_moe"}
