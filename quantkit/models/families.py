"""Model families as data: where the decoder blocks are, which matrices share an input, and what can absorb a scale.

The unit of work is a `MatrixGroup`: matrices that read the same input. A family lists the groups of a block in the order in
which the block runs them. To add a family, add a row to FAMILIES.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

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
        embedding, norm, head: paths of the embedding, of the last norm and of the output head.
        head_norms: whether queries and keys are normalized, each head by itself or all heads of a token together.
        qkv_bias: whether the matrices that make queries, keys and values have a bias, whatever config.json says.
        scaled_embedding: whether embeddings are multiplied by the square root of the hidden size.
        defaults: settings of config.json that the family has, and what they are if config.json leaves them out; those of
            `models.config` that all families have only where they differ.
    """

    groups: tuple[MatrixGroup, ...]
    soft_cap: bool = False
    blocks_path: str = "model.layers"
    norms: Norms = _BEFORE
    value_proj: str = "self_attn.v_proj"
    out_proj: str = "self_attn.o_proj"
    down_proj: str = "mlp.down_proj"
    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    head_norms: Literal["each head", "all heads"] | None = None
    qkv_bias: bool = False
    scaled_embedding: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

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
    scaled_embedding=True,
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

#: Qwen's sliding windows are off unless config.json turns them on; the first `max_window_layers` never have one.
_QWEN: dict[str, Any] = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
#: All of Gemma's layers but every n-th have a sliding window.
_GEMMA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}

#: `model_type` of config.json -> family.
FAMILIES: dict[str, Family] = {
    "llama": replace(LLAMA, defaults={"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False}),
    "mistral": replace(LLAMA, defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}),
    "qwen2": replace(LLAMA, qkv_bias=True, defaults=_QWEN),
    "qwen3": replace(LLAMA, head_norms="each head", defaults=_QWEN | {"head_dim": 128, "attention_bias": False}),
    "granite": replace(
        LLAMA,
        defaults={
            "max_position_embeddings": 2048,
            "attention_bias": False,
            "mlp_bias": False,
            "attention_multiplier": 1.0,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "phi3": replace(
        PHI3,
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
        },
    ),
    "gemma2": replace(
        GEMMA,
        soft_cap=True,
        defaults=_GEMMA
        | {
            "max_position_embeddings": 8192,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": replace(
        GEMMA,
        head_norms="each head",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 131_072,
            "sliding_window_pattern": 6,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
    ),
    "olmo2": replace(
        OLMO2,
        head_norms="all heads",
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "attention_bias": False},
    ),
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
