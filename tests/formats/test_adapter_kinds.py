"""formats/adapter_kinds.py: what an initialisation does to the base. Oracle: peft's table of variants, written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compresskit.errors import RequestError
from compresskit.formats.adapter_kinds import base_change, check_base_kept, check_plain

FILE = Path("adapter_config.json")


@pytest.mark.parametrize("value", [True, False, None, "gaussian", "Gaussian", "eva", "orthogonal", "mica", "MiCA"])
def test_initialisations_that_leave_the_base_change_nothing(value: Any) -> None:
    assert base_change(FILE, {"init_lora_weights": value}) == ""
    check_base_kept(FILE, {"init_lora_weights": value})


@pytest.mark.parametrize(("value", "change"), [("pissa", "pissa"), ("olora", "olora"), ("OLoRA", "olora")])
def test_initialisations_from_the_base_s_weights_are_known(value: str, change: str) -> None:
    assert base_change(FILE, {"init_lora_weights": value}) == change
    with pytest.raises(RequestError, match="path_initial_model_for_weight_conversion"):
        check_base_kept(FILE, {"init_lora_weights": value})


@pytest.mark.parametrize("value", ["pissa_niter_4", "corda", "loftq", "lora_ga", "PiSSA", "Eva", 0, 1, "", [], {}])
def test_all_others_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"adapter_config\.json: init_lora_weights"):
        base_change(FILE, {"init_lora_weights": value})


def test_what_is_said_by_no_key_is_plain_lora() -> None:
    check_plain(FILE, {"peft_type": "LORA"})
    check_plain(FILE, {"peft_type": "LORA", "use_dora": False, "modules_to_save": None})
    with pytest.raises(RequestError, match="peft_type"):
        check_plain(FILE, {})
