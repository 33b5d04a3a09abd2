"""Describe a loaded model for the native decoder.

The description is derived from transformers' modules, which remain unchanged. A model that the decoder cannot express has no
description and runs through transformers' definition. Examples are a rotary embedding that depends on the data, and q, k and v
that are packed in different ways or have groups on differently permuted columns.
"""

from typing import Any

from torch import Tensor, nn

from quantkit.kernels.cpu import structs
from quantkit.kernels.cpu.matmul import CpuWeight
from quantkit.models.families import Norms
from quantkit.runtime.model.attention import layer_window
from quantkit.runtime.model.layers import Embedding, FusedSlice, Linear, Norm
from quantkit.runtime.model.loader import Definition
from quantkit.runtime.model.native_decoder import DecoderLayer, DecoderModel, Projection, Rope

#: Name of an activation in transformers -> in the decoder.
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}

#: Rotary embeddings whose frequencies are the same for every length.
_FIXED_ROPES = {"default", "linear", "llama3", "yarn"}


def describe(definition: Definition) -> DecoderModel | None:
    """The model as plain data; None if the decoder cannot express it."""
    module, config = definition.module, definition.config
    ropes = _ropes(module.base_model.rotary_emb)
    activation = _ACTIVATIONS.get(getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None) or "")
    head = _projection([module.get_output_embeddings()])
    blocks = module.get_submodule(definition.family.blocks_path)
    layers = [_layer(block, definition.family.norms, config, ropes) for block in blocks]
    if activation is None or head is None or not ropes or any(layer is None for layer in layers):
        return None
    embedding = module.get_input_embeddings()
    assert isinstance(embedding, Embedding)
    if embedding.weight.dtype not in structs.TYPES:
        return None
    return DecoderModel(
        embedding=embedding.weight,
        layers=[layer for layer in layers if layer is not None],
        ropes=[rope for rope, _ in ropes.values()],
        norm=module.base_model.norm.weight,
        head=head,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=definition.layers[0].key_width,
        activation=activation,
        epsilon=config.rms_norm_eps,
        embedding_scale=embedding.scale * getattr(config, "embedding_multiplier", 1.0),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
    )


def _layer(block: Any, norms: Norms, config: Any, ropes: dict[str, tuple[Rope, int]]) -> DecoderLayer | None:
    """A block as plain data.

    None if its matrices are not fused, are not in a native layout, or are rotated elsewhere than in the down projection.
    """
    attention, mlp = block.self_attn, block.mlp
    fused = hasattr(attention, "qkv_proj")
    qkv = [attention.qkv_proj] if fused else [attention.q_proj, attention.k_proj, attention.v_proj]
    gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
    found = [_projection(modules) for modules in (qkv, [attention.o_proj], gate_up, [mlp.down_proj])]
    out = [projection for projection in found if projection is not None]
    if len(out) < len(found) or any(projection.hadamard for projection in out[:3]):
        return None
    kind = getattr(attention, "layer_type", None)
    pre_attention_norm, post_attention_norm, pre_mlp_norm, post_mlp_norm = (_norm(block, name) for name in norms)
    return DecoderLayer(
        qkv=out[0],
        out=out[1],
        gate_up=out[2],
        down=out[3],
        pre_attention_norm=pre_attention_norm,
        post_attention_norm=post_attention_norm,
        pre_mlp_norm=pre_mlp_norm,
        post_mlp_norm=post_mlp_norm,
        scale=attention.scaling,
        query_norm=_norm(attention, "q_norm"),
        key_norm=_norm(attention, "k_norm"),
        window=layer_window(attention, config),
        softcap=getattr(attention, "attn_logit_softcapping", None) or 0.0,
        rope=ropes[kind if kind in ropes else ""][1] if ropes else 0,
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


def _norm(parent: nn.Module, name: str | None) -> Tensor | None:
    norm = getattr(parent, name, None) if name else None
    return norm.weight if isinstance(norm, Norm) else None


def has_fixed_ropes(rotary: Any) -> bool:
    """Whether all rotary embeddings of a model are independent of the data."""
    return set(_kinds(rotary).values()) <= _FIXED_ROPES


def _kinds(rotary: Any) -> dict[str, str]:
    """Layer type -> type of rope; the key is "" if all layers share one."""
    return rotary.rope_type if isinstance(rotary.rope_type, dict) else {"": rotary.rope_type}


def _ropes(rotary: Any) -> dict[str, tuple[Rope, int]]:
    """Layer type -> rope and its index; the key is "" if all layers share one. Empty if a rope depends on the data."""
    if not has_fixed_ropes(rotary):
        return {}
    kinds = _kinds(rotary)
    prefixes = {kind: f"{kind}_" if kind else "" for kind in kinds}
    return {
        kind: (Rope(getattr(rotary, f"{prefix}inv_freq").float(), getattr(rotary, f"{prefix}attention_scaling")), number)
        for number, (kind, prefix) in enumerate(prefixes.items())
    }
