"""Keys of config.json with which stock tools fetch or choose code and weights that the folder does not hold.

transformers reads them without asking for `trust_remote_code`: a kernel named `who/what` is downloaded from the Hub and
imported as soon as the network is built. We build networks without them, and write none into OUT. What code a model ships
itself (`auto_map`) is another matter: it takes `--trust-remote-code`.
"""

from __future__ import annotations

from typing import Any

IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""Attributes of a transformers configuration: which function computes a part of the network; None for the usual one."""
FOREIGN_CODE = frozenset({
    *IMPLEMENTATIONS, *(name.removeprefix("_") for name in IMPLEMENTATIONS), *(f"{name}_internal" for name in IMPLEMENTATIONS),
    "_attn_implementation_autoset", "use_kernels", "_use_kernels", "kernel_config", "allow_all_kernels", "fusion_config",
    "custom_generate", "transformers_weights",
})  # fmt: skip
"""`transformers_weights` names another weight file than the one that was read, checked and compressed."""


def without_foreign_code(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without these keys, at any depth; everything else stays as it is, in order."""
    return {key: _without(value) for key, value in config.items() if key not in FOREIGN_CODE}


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return without_foreign_code(value)
    return [_without(each) for each in value] if isinstance(value, list) else value
