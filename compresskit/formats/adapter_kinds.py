"""What adapter_config.json says of a LoRA adapter's update: a plain product of its factors, or more than that.

`init_lora_weights` decides what peft does to the base when it loads the adapter (peft/tuners/lora/layer.py, update_layer):

    true, false, null, gaussian, eva, orthogonal, mica     nothing
    pissa          W <- W - U_r S_r V_r^T                  the r largest singular values of the base's own weight
    olora          W <- W - scaling Q_r R_r                the first r columns of its QR decomposition
    pissa_niter_N, corda, loftq, lora_ga                   by random numbers, by text, by a grid, by gradients

The second and third can be computed again from the base (models/initialised.py). The last ones cannot, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import shown
from compresskit.errors import RequestError

PISSA, OLORA = "pissa", "olora"
NOTHING = ("eva", "orthogonal")
NOTHING_IN_ANY_CASE = ("gaussian", "mica")
UNKNOWN_CHANGE = ("pissa_niter_", "corda", "loftq", "lora_ga")
"""How the names of initialisations begin that change the base by what the adapter does not store."""
CONVERT = (
    "save it as plain LoRA where it was trained (peft's save_pretrained with path_initial_model_for_weight_conversion), or "
    "merge it with peft first"
)
UNREAD = {
    "kasa_config": "KaSA", "use_qalora": "QA-LoRA", "monteclora_config": "MonteCLoRA", "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow routing", "velora_config": "VeLoRA", "layer_replication": "repeated layers",
}  # fmt: skip
"""Keys of variants whose factors mean something else than LoRA's."""
BESIDE = {
    "use_dora": "DoRA", "target_parameters": "factors of experts", "alora_invocation_tokens": "activated LoRA",
    "modules_to_save": "whole modules", "trainable_token_indices": "trained tokens",
}  # fmt: skip
"""Keys of adapters that hold LoRA factors, but whose update is more than their plain product."""


def check_read(path: Path, config: Mapping[str, Any]) -> None:
    """Raise RequestError if the factors of the adapter are not LoRA's. `path`: of the configuration."""
    for key, name in UNREAD.items():
        if config.get(key):
            raise RequestError(f"{path}: {key} is set ({name}), which is not read here; merge the adapter with peft first")


def check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Raise RequestError unless the update is the plain product of LoRA factors, what the initialisation changes aside."""
    if config.get("peft_type") != "LORA":
        what = f"peft_type is {shown(config.get('peft_type'))}"
        raise RequestError(f"{path}: {what}, only plain LoRA can be used here; merge the adapter with peft first")
    check_read(path, config)
    for key, name in BESIDE.items():
        if config.get(key):
            what = f"{key} is set ({name}), only plain LoRA can be used here"
            raise RequestError(f"{path}: {what}; merge the adapter with peft first")


def base_change(path: Path, config: Mapping[str, Any]) -> str:
    """What loading the adapter does to the weights of its linears.

    Returns:
        "" for nothing, PISSA or OLORA.

    Raises:
        RequestError: what it does cannot be told from the adapter and its base, or peft knows no such initialisation.
    """
    value = config.get("init_lora_weights", True)
    if value is None or isinstance(value, bool) or value in NOTHING:
        return ""
    if isinstance(value, str):
        if value.lower() in NOTHING_IN_ANY_CASE:
            return ""
        if value == PISSA or value.lower() == OLORA:
            return value.lower()
        if value.startswith(UNKNOWN_CHANGE):
            what = f"init_lora_weights is {shown(value)}, which changed the base by what the adapter does not store"
            raise RequestError(f"{path}: {what}; {CONVERT}")
    raise RequestError(f"{path}: init_lora_weights is {shown(value)}, which peft does not know; restore the file")


def check_base_kept(path: Path, config: Mapping[str, Any], remedy: str = "") -> None:
    """Raise RequestError if loading the adapter changes the base. `remedy`: what else helps, for the error."""
    change = base_change(path, config)
    if change:
        what = f"init_lora_weights is {shown(change)}: its factors start from the base's own weights"
        raise RequestError(f"{path}: {what}; {remedy}{CONVERT}")
