"""Describe a loaded model for the native decoder.

The description is derived from the model's config and its modules, which remain unchanged. A model that the decoder cannot
express has no description and runs through transformers' definition. Examples are a rotary embedding that depends on the data,
and q, k and v that are packed in different ways or have groups on differently permuted columns.
"""

from torch import Tensor, nn

from quantkit.kernels.cpu import structs
from quantkit.kernels.cpu.matmul import CpuWeight
from quantkit.runtime.model.layers import Embedding, FusedSlice, Linear, Norm
from quantkit.runtime.model.loader import LoadedModel
from quantkit.runtime.model.native_decoder import DecoderLayer, DecoderModel, Projection, Rope

#: Name of an activation in transformers -> in the decoder.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def describe(loaded: LoadedModel) -> DecoderModel | None:
    """The model as plain data; None if the decoder cannot express it."""
    config, family = loaded.config, loaded.config.family
    activation, head = _ACTIVATIONS.get(config.activation), _projection([loaded.head])
    embedding = loaded.modules[family.embedding]
    assert isinstance(embedding, Embedding)
    fixed = all(rope.is_fixed for rope in config.ropes)
    if activation is None or head is None or not fixed or embedding.weight.dtype not in structs.TYPES:
        return None
    layers = [_layer(loaded, number) for number in range(len(config.windows))]
    norm = _norm(loaded, family.norm)
    assert norm is not None
    if any(layer is None for layer in layers):
        return None
    return DecoderModel(
        embedding=embedding.weight,
        layers=[layer for layer in layers if layer is not None],
        ropes=[Rope(*rope.frequencies()) for rope in config.ropes],
        norm=norm,
        head=head,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        activation=activation,
        epsilon=config.epsilon,
        embedding_scale=config.embedding_scale * config.embedding_multiplier,
        residual_scale=config.residual_scale,
        logit_scale=config.logit_scale,
        logit_softcap=config.logit_softcap,
    )


def _layer(loaded: LoadedModel, number: int) -> DecoderLayer | None:
    """A block as plain data.

    None if its matrices are not fused, are not in a native layout, or are rotated elsewhere than in the down projection.
    """
    config, family = loaded.config, loaded.config.family
    prefix = f"{family.blocks_path}.{number}."
    found = [_projection([loaded.modules[prefix + name] for name in group.names]) for group in family.groups]
    matrices = [projection for projection in found if projection is not None]
    if len(matrices) < len(found) or any(projection.hadamard for projection in matrices[:3]):
        return None
    qkv, out, gate_up, down = matrices
    pre_attention_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm = (
        None if name is None else _norm(loaded, prefix + name) for name in family.norms
    )
    return DecoderLayer(
        qkv=qkv,
        out=out,
        gate_up=gate_up,
        down=down,
        pre_attention_norm=pre_attention_norm,
        post_attention_norm=post_attention_norm,
        pre_mlp_norm=pre_mlp_norm,
        post_mlp_norm=post_mlp_norm,
        scale=config.attention_scale,
        query_norm=_norm(loaded, f"{prefix}self_attn.q_norm"),
        key_norm=_norm(loaded, f"{prefix}self_attn.k_norm"),
        window=config.windows[number],
        softcap=config.attention_softcap,
        rope=config.layer_ropes[number],
    )


def _projection(modules: list[nn.Module]) -> Projection | None:
    """The one matrix that some modules share; None if there are several, or its layout is not native."""
    first = modules[0]
    if isinstance(first, FusedSlice):
        assert [module.fused for module in modules if isinstance(module, FusedSlice)] == [first.fused] * len(modules)
        linear = first.fused.linear
    elif isinstance(first, Linear) and len(modules) == 1:
        linear = first
    else:
        return None
    weight = linear.kernel_weight
    if not isinstance(weight, CpuWeight) or weight.layout not in ("tiles", "dense"):
        return None
    return Projection(weight, linear.bias, linear.hadamard, None if linear.column_perm is None else linear.column_perm.int())


def _norm(loaded: LoadedModel, path: str) -> Tensor | None:
    norm = loaded.modules.get(path)
    return norm.weight if isinstance(norm, Norm) else None
