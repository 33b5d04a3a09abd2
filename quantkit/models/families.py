"""Model families as data: where the decoder blocks are, which matrices share an input, and what can absorb a scale.

The unit of work is a `MatrixGroup`: matrices that read the same input. A family lists the groups of a block in the order in
which the block runs them. To add a family, add a row to FAMILIES.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from quantkit.errors import CheckpointError


@dataclass(frozen=True)
class Fold:
    """What produces a group's input, so that dividing it by a per-channel scale divides the input.

    A fused matrix (qkv, gate_up) produces more than the group's input: then its last rows produce the input.

    Attributes:
        producer: the module inside the block whose output channels become the group's input channels.
        offset: 1.0 if the norm multiplies by (1 + weight), as Gemma's does.
        heads: the input has the values of one KV head per query head, repeated for every query head that shares it.
    """

    producer: str
    offset: float = 0.0
    repeats_kv_heads: bool = False


@dataclass(frozen=True)
class MatrixGroup:
    """Matrices inside a block that read the same input.

    Attributes:
        names: modules with a `weight` [N, K], in the order in which they run.
        fold: what absorbs a scale of the input; None if nothing can.
    """

    names: tuple[str, ...]
    fold: Fold | None


class Norms(NamedTuple):
    """A block's norms over the hidden size, by position; None where the family has no norm."""

    pre_attention_norm: str | None = "input_layernorm"
    post_attention_norm: str | None = None
    pre_mlp_norm: str | None = "post_attention_layernorm"
    post_mlp_norm: str | None = None


_BEFORE = Norms()


@dataclass(frozen=True)
class Family:
    """A model family of transformers.

    Attributes:
        groups: the groups of a block, in run order.
        soft_cap: whether attention logits are capped, which fast attention implementations do not support.
        blocks_path: path of the list of decoder blocks.
        norms: the norms of a block.
        value_proj: the matrix whose last rows are attention's values.
        out_proj, down_proj: the last matrices of attention and of the MLP.
    """

    groups: tuple[MatrixGroup, ...]
    soft_cap: bool = False
    blocks_path: str = "model.layers"
    norms: Norms = _BEFORE
    value_proj: str = "self_attn.v_proj"
    out_proj: str = "self_attn.o_proj"
    down_proj: str = "mlp.down_proj"

    @property
    def matrices(self) -> tuple[str, ...]:
        """All quantizable modules of a block, in run order."""
        return tuple(name for group in self.groups for name in group.names)

    @property
    def rotatable(self) -> bool:
        """Whether the residual stream can be rotated: only matrices write to it."""
        return self.norms.post_attention_norm is self.norms.post_mlp_norm is None

    @property
    def residual_readers(self) -> dict[str, str]:
        """The matrices that read the residual stream, and the norm through which each reads it."""
        folds = {name: group.fold for group in self.groups for name in group.names}
        return {name: fold.producer for name, fold in folds.items() if fold and fold.producer in self.norms}

    @property
    def residual_writers(self) -> tuple[str, ...]:
        """The matrices that write to the residual stream: attention's, then the MLP's."""
        return self.out_proj, self.down_proj

    def rotated(self) -> "Family":
        """The family after a rotation: nothing can absorb a scale of the down projection's input any more."""
        return replace(self, groups=tuple(replace(g, fold=None) if self.down_proj in g.names else g for g in self.groups))

    @property
    def norm_offset(self) -> float:
        """What every RMS norm of the family adds to its stored weight."""
        return max((group.fold.offset for group in self.groups if group.fold), default=0.0)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_OUT = MatrixGroup(("self_attn.o_proj",), Fold("self_attn.v_proj", repeats_kv_heads=True))
_DOWN = MatrixGroup(("mlp.down_proj",), Fold("mlp.up_proj"))

LLAMA = Family(
    (MatrixGroup(_QKV, Fold("input_layernorm")), _OUT, MatrixGroup(_GATE_UP, Fold("post_attention_layernorm")), _DOWN)
)
GEMMA = Family(
    (
        MatrixGroup(_QKV, Fold("input_layernorm", offset=1.0)),
        _OUT,
        MatrixGroup(_GATE_UP, Fold("pre_feedforward_layernorm", offset=1.0)),
        _DOWN,
    ),
    norms=Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
PHI3 = Family(
    (
        MatrixGroup(("self_attn.qkv_proj",), Fold("input_layernorm")),
        MatrixGroup(("self_attn.o_proj",), Fold("self_attn.qkv_proj", repeats_kv_heads=True)),
        MatrixGroup(("mlp.gate_up_proj",), Fold("post_attention_layernorm")),
        MatrixGroup(("mlp.down_proj",), Fold("mlp.gate_up_proj")),
    ),
    value_proj="self_attn.qkv_proj",
)
# OLMo 2 normalizes the outputs of attention and MLP. Their inputs are the residual stream itself, so no scale can be folded.
OLMO2 = Family(
    (MatrixGroup(_QKV, None), _OUT, MatrixGroup(_GATE_UP, None), _DOWN),
    norms=Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)

#: `model_type` of config.json -> family.
FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "granite": LLAMA,
    "phi3": PHI3,
    "gemma2": replace(GEMMA, soft_cap=True),
    "gemma3_text": GEMMA,
    "olmo2": OLMO2,
}


def family_of(model_type: str, where: str) -> Family:
    """The family of a `model_type`; `where` is the file that names it.

    Raises:
        CheckpointError: there is no such family.
    """
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise CheckpointError(
            f"{where}: architecture '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}"
        ) from None
