"""What each client has kernels for: the forms in which `quantize` can store linears, and who runs them.

A row holds a form that a client runs. Its `source` is an artifact of the client bench, whose row in
benchmarks/results/clients.jsonl says "runs" (a test compares), "tried: " and the page that has the trial, or "read: " and a file
of the client, where no machine with the client's hardware was at hand. What no row holds is refused, with the rows of its
client as the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Client = Literal["transformers", "vllm-cpu", "vllm-cuda", "llama.cpp"]
GRID, NF4, UNKNOWN = "grid", "nf4", "unknown"
READ, TRIED = "read: ", "tried: "
STATIC = " with static activations"
"""Behind the name of a format whose inputs have one fixed scale."""
BOTH = (True, False)
ROW = 0
"""Group size of a scale for a whole row."""


@dataclass(frozen=True)
class Form:
    """How linears are stored."""

    kind: str
    """`GRID`, `NF4`, or the name of a format of its own, such as fp8."""
    bits: int = 4
    symmetric: bool = True
    group: int = ROW
    """Inputs that share a scale."""


@dataclass(frozen=True)
class Kernel:
    """Forms that a client runs."""

    client: Client
    kind: str
    source: str
    bits: tuple[int, ...] = ()
    symmetric: tuple[bool, ...] = BOTH
    groups: tuple[int, ...] = ()
    """Group sizes; empty for all."""
    multiple: int = 1
    """Of which a group size is a multiple, where it is not a whole row."""

    def runs(self, form: Form) -> bool:
        """Whether it takes the form."""
        if self.kind != form.kind:
            return False
        fits = form.group in self.groups if self.groups else form.group % self.multiple == 0
        return form.kind != GRID or (form.bits in self.bits and form.symmetric in self.symmetric and fits)

    def __str__(self) -> str:
        if self.kind != GRID:
            return self.kind
        words = f"{_either(self.bits)} bits"
        if self.symmetric != BOTH:
            words += " " + " ".join("--symmetric" if each else "--asymmetric" for each in self.symmetric)
        if self.groups:
            words += f" with --group-size {_either(self.groups)}"
        elif self.multiple > 1:
            words += f" with --group-size 0 or a multiple of {self.multiple}"
        return words


FORMATS, LOADERS = TRIED + "docs/evidence/formats.md", READ + "vllm/model_executor/layers/quantization/compressed_tensors/"
MARLIN = READ + "vllm/model_executor/layers/quantization/utils/marlin_utils.py"
KERNELS = (
    Kernel("transformers", GRID, "4-bit-symmetric", bits=(2, 3, 4, 5, 6, 7, 8)),
    Kernel("transformers", NF4, "nf4"),
    *(Kernel("transformers", kind, FORMATS) for kind in ("fp8", f"fp8{STATIC}", "fp8-block", "int8", "nvfp4", "mxfp4")),
    Kernel("vllm-cpu", GRID, "4-bit-asymmetric", bits=(4,), multiple=2),
    *(Kernel("vllm-cpu", kind, FORMATS) for kind in ("fp8", "int8")),
    *(Kernel("vllm-cuda", kind, LOADERS) for kind in ("fp8", f"fp8{STATIC}", "fp8-block", "int8", "nvfp4", "mxfp4")),
    Kernel("vllm-cuda", GRID, MARLIN, bits=(4,), groups=(ROW, 32, 64, 128)),
    Kernel("vllm-cuda", GRID, MARLIN, bits=(8,), symmetric=(True,), groups=(ROW, 32, 64, 128)),
    Kernel("llama.cpp", GRID, "4-bit-asymmetric", bits=(4,), multiple=32),
    Kernel("llama.cpp", GRID, "3-bit-symmetric", bits=(2, 3), multiple=32),
    Kernel("llama.cpp", GRID, "8-bit-symmetric", bits=(8,), symmetric=(True,), multiple=32),
)
"""llama.cpp's are the forms that a block type of GGUF holds exactly."""
ADVICE = {
    "vllm-cuda": "vLLM runs other widths where the package humming is installed beside it",
    "llama.cpp": "other forms lose more when they are converted to GGUF",
}


def runs(client: Client, form: Form) -> bool:
    """Whether the client has a kernel for the form."""
    return any(kernel.client == client and kernel.runs(form) for kernel in KERNELS)


def needs_symmetry(client: Client, bits: int) -> bool:
    """Whether the client runs this width only without zero points; False too where it does not run it at all."""
    found = {each for kernel in of(client) if kernel.kind == GRID and bits in kernel.bits for each in kernel.symmetric}
    return found == {True}


def of(client: Client) -> Iterable[Kernel]:
    """The client's rows."""
    return (kernel for kernel in KERNELS if kernel.client == client)


def refusal(client: Client, form: Form) -> str:
    """Why the client does not run the form, with what it runs instead; "" if it does."""
    if runs(client, form):
        return ""
    group = "a row" if form.group == ROW else f"{form.group} inputs"
    symmetry = "symmetric" if form.symmetric else "asymmetric"
    asked = f"{form.bits} bits, {symmetry}, in groups of {group}" if form.kind == GRID else form.kind
    takes = "; or ".join(map(str, of(client)))
    return f"{client} has no kernel for {asked}; it runs {takes}" + (f"; {ADVICE[client]}" if client in ADVICE else "")


def was_run(client: Client, form: Form) -> bool:
    """Whether the client bench ran the form, so that a command for it can be shown."""
    return any(kernel.runs(form) for kernel in of(client) if not kernel.source.startswith(READ))


def stored_forms(config: Mapping[str, Any]) -> list[Form]:
    """The forms of linears that a config.json states, none for a dense checkpoint; what no row can match where it is damaged."""
    stated = config.get("quantization_config")
    if stated is None:
        return []
    if not isinstance(stated, dict):
        return [Form(UNKNOWN)]
    if stated.get("quant_method") == "bitsandbytes" and stated.get("bnb_4bit_quant_type") == "nf4":
        return [Form(NF4)]
    groups = stated.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(each, dict) for each in groups.values()):
        return [Form(UNKNOWN)]
    if stated.get("format") == "pack-quantized":
        return [_packed(each.get("weights")) for each in groups.values()]
    return [Form(_named(stated.get("format"), each)) for each in groups.values()]


def _named(form: Any, group: Mapping[str, Any]) -> str:
    """The name of a format of its own, as `--format` spells it, from a config group."""
    weights, inputs = (found if isinstance(found := group.get(key), dict) else {} for key in ("weights", "input_activations"))
    if form == "float-quantized":
        block = "-block" if weights.get("strategy") == "block" else ""
        return f"fp8{block}{STATIC if inputs.get('dynamic') is False else ''}"
    known = {"int-quantized": "int8", "nvfp4-pack-quantized": "nvfp4", "mxfp4-pack-quantized": "mxfp4"}
    return known.get(form, UNKNOWN) if isinstance(form, str) else UNKNOWN


def _packed(weights: Any) -> Form:
    if not isinstance(weights, dict):
        return Form(UNKNOWN)
    bits, size, symmetric = weights.get("num_bits"), weights.get("group_size") or ROW, weights.get("symmetric")
    if type(bits) is not int or type(size) is not int or type(symmetric) is not bool:
        return Form(UNKNOWN)
    return Form(GRID, bits, symmetric, max(size, ROW))


def _either(values: Iterable[int]) -> str:
    *first, last = map(str, values)
    return f"{', '.join(first)} or {last}" if first else last
