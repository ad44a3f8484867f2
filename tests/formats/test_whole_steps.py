"""formats/whole_steps.py: scale * steps is the weight that the library unpacks. Oracle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, Run
from safetensors.torch import save_file

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.formats import open_format
from compresskit.formats.whole_steps import range_of, read_steps, scheme_of
from compresskit.models.load import open_any
from compresskit.numerics.scheme import Scheme


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 0])
def test_scale_times_steps_is_the_unpacked_weight(
    group: int, symmetric: bool, tiny: dict[str, Path], tmp_path: Path, run: Run, text_file: Path
) -> None:
    flags = ("--bits", 3, "--group-size", group, "--symmetric" if symmetric else "--asymmetric", "--calibration", text_file)
    assert run("quantize", "rtn", tiny["llama"], tmp_path / "low", *flags, *SMALL)[0] in (0, 3)
    model = open_any(str(tmp_path / "low"))
    assert model.format is not None
    name = model.linears[-1]
    steps, scale = read_steps(model.format, name)
    wanted = model.format.read(name)
    product = steps.view(*scale.shape, -1) * scale[..., None]
    assert torch.equal(product.flatten(1).to(wanted.dtype), wanted)
    scheme = scheme_of(model.format, name)
    assert scheme is not None
    lowest, highest = range_of(scheme)
    assert lowest <= int(steps.min()) <= int(steps.max()) <= highest <= (3 if symmetric else 7)


def test_a_codebook_has_no_steps(tiny: dict[str, Path], tmp_path: Path, run: Run, text_file: Path) -> None:
    assert run("quantize", "nf4", tiny["llama"], tmp_path / "low", "--calibration", text_file, *SMALL)[0] in (0, 3)
    model = open_any(str(tmp_path / "low"))
    assert model.format is not None
    assert scheme_of(model.format, model.linears[0]) is None


@pytest.mark.parametrize(("config", "expected"), [
    ({"quant_method": "gptq", "sym": True}, Scheme(4, 16, True)),
    ({"quant_method": "gptq"}, Scheme(4, 16, False)),
    ({"quant_method": "gptq", "desc_act": True}, None),
])  # fmt: skip
def test_gptq_files_have_steps_unless_activations_order_the_groups(
    config: dict[str, object], expected: Scheme | None, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    stored = {
        "a.qweight": torch.randint(-(2**31), 2**31 - 1, (4, 64), generator=generator, dtype=torch.int32),
        "a.qzeros": torch.randint(-(2**31), 2**31 - 1, (2, 8), generator=generator, dtype=torch.int32),
        "a.scales": torch.rand(2, 64, generator=generator),
    }
    save_file(stored, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "quantization_config": {"bits": 4, "group_size": 16, **config}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_format(open_checkpoint(tmp_path))
    assert found is not None
    assert scheme_of(found, "a") == expected
    steps, scale = read_steps(found, "a")
    product = (steps.view(64, 2, 16) * scale[..., None]).flatten(1)
    assert torch.allclose(product, found.read("a"))
    lowest, highest = range_of(Scheme(4, 16, False))
    assert lowest <= int(steps.min()) <= int(steps.max()) <= highest
