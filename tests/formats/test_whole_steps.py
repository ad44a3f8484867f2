"""formats/whole_steps.py: scale * steps is the weight that the library unpacks. Oracle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import SMALL, Run

from compresskit.formats.whole_steps import range_of, read_steps, scheme_of
from compresskit.models.load import open_any


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
    assert lowest <= int(steps.min()) <= int(steps.max()) <= highest == (3 if symmetric else 7)


def test_a_codebook_has_no_steps(tiny: dict[str, Path], tmp_path: Path, run: Run, text_file: Path) -> None:
    assert run("quantize", "nf4", tiny["llama"], tmp_path / "low", "--calibration", text_file, *SMALL)[0] in (0, 3)
    model = open_any(str(tmp_path / "low"))
    assert model.format is not None
    assert scheme_of(model.format, model.linears[0]) is None
