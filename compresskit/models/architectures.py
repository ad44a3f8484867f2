"""What a stage has to know of a network: its blocks, their linears in compute order, their feed-forward networks.

For any model of transformers this is derived from the stock network (derivation.py). The table here holds the families
whose structure is known ahead, so that their checkpoints open without torch; a test compares each row with what the
derivation finds. No other file of this package names a module of a model.

A *sublayer* consists of the linears that read the residual stream (`in_projections`) and the one that writes to it
(`out_projection`). Names are *plain* names: the module names of transformers, with one set of linears per expert.
`Model.stored_name` (model.py) maps a plain name to the name in the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

RAGGED_PREFIX = "compresskit_"
"""Prefix of the `model_type` of checkpoints with per-block widths (see layouts.py)."""
REPLACED_EXPERTS = dict.fromkeys(
    ("llama4", "llama4_text"), "transformers puts linears in place of its experts' one tensor as soon as any linear is packed"
)
"""Families whose linears cannot be packed, and why: what no trace of the dense network shows."""
GATE, UP, DOWN, GATE_AND_UP = "gate_proj", "up_proj", "down_proj", "gate_up_proj"
"""An expert's linears, in transformers' classes of experts and in ours; gate and up may be one matrix."""
HEAD = "lm_head"
"""Module path of the output embedding, in every family of the table."""


@dataclass(frozen=True)
class Sublayer:
    """Names of linears inside a block; `{expert}` stands for the expert's number."""

    in_projections: tuple[str, ...]
    out_projection: str
    width_key: str = ""
    """Key of config.json with the width of the feed-forward network."""
    fused: int = 1
    """Number of equal row groups in an input projection (2 if gate and up share one matrix)."""
    multiple: int = 1
    """Width per unit of the configuration key: two shared experts of one width are one network of twice that."""
    interleaved: bool = False
    """Whether the rows of the groups alternate (gate 0, up 0, gate 1, ...) instead of following each other."""


Positions = tuple[tuple[tuple[str, ...], ...], ...]
"""Positions of groups of linears inside a block; later positions see the edits of earlier ones, a group shares its input."""


@dataclass(frozen=True)
class Packed:
    """A tensor of every expert that lies in one stored tensor of all experts."""

    plain: str
    """Its plain name, with `{expert}` for the expert's number."""
    stored: str
    """Stored name inside the block; (experts, ...)."""
    transposed: bool = False
    """Whether the stored matrices are (in, out)."""
    part: int = 0
    parts: int = 1
    """Which of how many equal parts of the stored rows: gate and up share one tensor."""
    by_shape: bool = False
    """Whether transformers tells by the shape alone that the stored matrices are transposed."""


@dataclass(frozen=True)
class BlockStructure:
    """One kind of block. Names are relative to the block; `{expert}` stands for the expert's number."""

    positions: Positions
    """The linears that can be replaced, in compute order."""
    ffns: tuple[Sublayer, ...] = ()
    """Feed-forward networks whose channels can be removed; a block has those whose weights are stored."""
    mixer: str = ""
    """Module (the attention) whose output is final once the first `mixer_positions` are edited; "" if there is none."""
    mixer_positions: int = 2
    names: tuple[tuple[str, str], ...] = ()
    """(plain, stored) name of every tensor of the block, if derived."""
    packed: tuple[Packed, ...] = ()
    """Tensors of experts that are stored as one tensor of all experts."""
    untouched: tuple[tuple[str, str], ...] = ()
    """(plain name, reason) of weights of two and more dimensions that no stage can edit; they stay as they are."""
    tuple_length: int = 0
    """Length of the tuple that the block returns, its hidden states first; 0 if it returns the tensor itself."""
    runs: bool = True
    """Whether the block runs on text alone; a block that attends to images does not."""


@dataclass(frozen=True)
class Sizes:
    """Numbers that a derived structure takes from the network."""

    hidden: int
    blocks: int
    vocabulary: int
    experts: int = 0
    """Most experts of a block."""


@dataclass(frozen=True)
class Architecture:
    """One model family, or the derived structure of one model."""

    blocks: str
    """Module path of the list of blocks."""
    attention: Sublayer
    ffns: tuple[Sublayer, ...]
    """Kinds of feed-forward network that a block can have; a block has those whose weights are stored."""
    embedding: str = "model.embed_tokens"
    """Module path of the token embedding."""
    hidden_key: str = "hidden_size"
    count_key: str = "num_hidden_layers"
    transposed: bool = False
    """Whether weights are stored as (in, out), like GPT-2's Conv1D."""
    renames: tuple[tuple[str, str], ...] = ()
    """(plain, stored) name parts inside a block."""
    outer_renames: tuple[tuple[str, str], ...] = ()
    """(plain, stored) name parts outside the blocks."""
    experts: str = ""
    """Module path of the experts inside a block."""
    ffn_bias_key: str = ""
    """Key of config.json that adds a bias to every linear of the feed-forward network."""
    aliases: tuple[tuple[str, int], ...] = ()
    """(config key, multiple of the hidden size) for widths that a config may omit."""
    head: str = HEAD
    """Module path of the output embedding."""
    sizes: Sizes | None = None
    """Set if derived; table rows have keys of config.json instead."""
    kinds: tuple[BlockStructure, ...] = ()
    """Kinds of blocks, if derived."""
    kind_of: tuple[int, ...] = ()
    """Index of each block's kind, if derived."""
    stored_blocks: str = ""
    """Stored path of the list of blocks, if derived."""
    outer_names: tuple[tuple[str, str], ...] = ()
    """(plain, stored) name of every tensor outside the blocks, if derived."""
    dense_linears: tuple[str, ...] = ()
    """Linears of the whole stock network that no stage edits: routers, vision towers, the head; if derived."""
    converted: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(parameter, stored tensors) of what transformers converts on loading in a way that no stage can edit, if derived."""
    widths: tuple[tuple[str, int], ...] = ()
    """(configuration key, value) of the width keys, if derived."""
    classes: tuple[str, str, str] = ("", "", "")
    """Names of the configuration, base and whole class in transformers, if derived."""

    @property
    def derived(self) -> bool:
        """Whether this is the structure of one model, not a row of the table."""
        return self.sizes is not None

    def block(self, index: int) -> BlockStructure:
        """Structure of block `index`."""
        return self.kinds[self.kind_of[index]] if self.derived else _of_row(self)

    @property
    def has_experts(self) -> bool:
        """Whether some block has experts among the linears that can be replaced."""
        if not self.derived:
            return bool(self.experts)
        return any("{expert}" in name for kind in self.kinds for group in kind.positions for names in group for name in names)


@cache
def _of_row(row: Architecture) -> BlockStructure:
    """The block of a row: attention inputs, attention output, and the inputs and outputs of all feed-forward networks."""
    attention = row.attention
    positions = (
        (attention.in_projections,),
        ((attention.out_projection,),),
        tuple(ffn.in_projections for ffn in row.ffns),
        tuple((ffn.out_projection,) for ffn in row.ffns),
    )
    return BlockStructure(positions, row.ffns, attention.out_projection.rpartition(".")[0], len(positions) // 2)


_ATTENTION = Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj")
_GATED = Sublayer(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj", "intermediate_size")


def _experts(width_key: str) -> Sublayer:
    path = "mlp.experts.{expert}."
    return Sublayer((path + "gate_proj", path + "up_proj"), path + "down_proj", width_key)


_LLAMA = Architecture("model.layers", _ATTENTION, (_GATED,))
_LLAMA_WITH_BIAS_KEY = Architecture("model.layers", _ATTENTION, (_GATED,), ffn_bias_key="mlp_bias")
_QWEN_MOE_SHARED = Sublayer(
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "mlp.shared_expert.down_proj",
    "shared_expert_intermediate_size",
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama": _LLAMA_WITH_BIAS_KEY,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA_WITH_BIAS_KEY,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "phi": Architecture(
        "model.layers",
        Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.dense"),
        (Sublayer(("mlp.fc1",), "mlp.fc2", "intermediate_size"),),
    ),
    "phi3": Architecture(
        "model.layers",
        Sublayer(("self_attn.qkv_proj",), "self_attn.o_proj", fused=3),
        (Sublayer(("mlp.gate_up_proj",), "mlp.down_proj", "intermediate_size", fused=2),),
    ),
    "opt": Architecture(
        "model.decoder.layers",
        Sublayer(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj"),
        (Sublayer(("fc1",), "fc2", "ffn_dim"),),
        embedding="model.decoder.embed_tokens",
    ),
    "gpt2": Architecture(
        "transformer.h",
        Sublayer(("attn.c_attn",), "attn.c_proj", fused=3),
        (Sublayer(("mlp.c_fc",), "mlp.c_proj", "n_inner"),),
        embedding="transformer.wte",
        hidden_key="n_embd",
        count_key="n_layer",
        transposed=True,
        aliases=(("n_inner", 4),),
    ),
    "gpt_neox": Architecture(
        "gpt_neox.layers",
        Sublayer(("attention.query_key_value",), "attention.dense", fused=3),
        (Sublayer(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "intermediate_size"),),
        embedding="gpt_neox.embed_in",
        outer_renames=((HEAD, "embed_out"),),
    ),
    "mixtral": Architecture(
        "model.layers",
        _ATTENTION,
        (_experts("intermediate_size"),),
        renames=(("mlp.", "block_sparse_moe."), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")),
        experts="mlp.experts",
    ),
    "qwen2_moe": Architecture(
        "model.layers",
        _ATTENTION,
        (_GATED, _experts("moe_intermediate_size"), _QWEN_MOE_SHARED),
        experts="mlp.experts",
    ),
    "qwen3_moe": Architecture("model.layers", _ATTENTION, (_GATED, _experts("moe_intermediate_size")), experts="mlp.experts"),
}
