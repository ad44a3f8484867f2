"""formats/bitsandbytes.py: a checkpoint in 8 bits is read (oracle: the weights that transformers rounded) and repaired."""

from __future__ import annotations

import shutil
from pathlib import Path

from compensation_runs import run
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compresskit.compensation.eora import EoRA
from compresskit.models.load import open_model
from compresskit.models.meta import read_plain


def test_an_8_bit_checkpoint_of_bitsandbytes_is_read(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(
        tiny["llama"], quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    network.save_pretrained(tmp_path / "int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny["llama"] / name, tmp_path / "int8" / name)
    model, original = open_model(tmp_path / "int8"), open_model(tiny["llama"])
    for name in model.linears:
        found, wanted = (read_plain(each, f"{name}.weight") for each in (model, original))
        assert (found - wanted).abs().max() <= wanted.abs().max() / 127, name
    text = {"calibration": str(text_file), "samples": 6, "sequence_length": 64}
    result = run(EoRA(rank=4), tmp_path / "int8", tmp_path / "out", tiny["llama"], text)
    assert result["kl_after"] < result["kl_before"]
