"""A whole decoder as one native call per step: no Python runs between its layers.

The model is described by plain data: families differ in a number, a flag or an absent norm. `native_builder` writes the
description; this file lays it out for `kernels/cpu/csrc/decoder.c`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.kernels.cpu import library, structs
from quantkit.kernels.cpu.matmul import CpuWeight
from quantkit.kernels.layouts.quantized_kv import Cache
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.model.attention import measure
from quantkit.runtime.model.layers import head_bits

#: Activation of the MLP's gate -> its code in decoder.c.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


@dataclass(frozen=True)
class Projection:
    """y = x W^T + bias.

    Attributes:
        weight: [N, K], in the layout "tiles" or "dense".
        bias: float32 [N], or None.
        hadamard: block size of the Hadamard transform of x, 0 for none; only `down` may have one.
        column_perm: int32 [K], the column of x that each column of a packed W multiplies; None: the same column.
    """

    weight: CpuWeight
    bias: Tensor | None = None
    hadamard: int = 0
    column_perm: Tensor | None = None


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: elements i and i + pairs of a head are rotated by the angle position * frequencies[i].

    Attributes:
        frequencies: float32 [pairs]; 2 * pairs may be less than the head's width.
        scaling: factor that the rotated elements are multiplied by.
    """

    frequencies: Tensor
    scaling: float = 1.0


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder block. Norms are the float32 weights of RMS norms, including the family's offset; None if there is no norm.

    Attributes:
        qkv: rows of all queries, then keys, then values.
        out: output projection of attention.
        gate_up: rows of the gate, then of the up projection.
        down: down projection of the MLP.
        pre_attention_norm, post_attention_norm: [hidden], before and after attention.
        pre_mlp_norm, post_mlp_norm: [hidden], before and after the MLP.
        query_norm, key_norm: [head_dim] to normalize each head by itself, or [heads * head_dim] for all heads together.
        scale: factor of attention scores.
        window: keys that a query sees, including its own; 0 for all.
        softcap: soft cap of attention scores; 0 for none.
        sinks: float32 [heads], see `reference.paged_attention`.
        rope: index into the decoder's ropes.
    """

    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    pre_attention_norm: Tensor | None
    post_attention_norm: Tensor | None
    pre_mlp_norm: Tensor | None
    post_mlp_norm: Tensor | None
    scale: float
    query_norm: Tensor | None = None
    key_norm: Tensor | None = None
    window: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None
    rope: int = 0


@dataclass(frozen=True)
class DecoderModel:
    """A decoder-only language model.

    Attributes:
        embedding: [V, hidden] in float32, float16 or bfloat16; `embedding_scale` multiplies its rows.
        layers: the blocks in order.
        ropes: indexed by the layers' `rope`.
        norm: float32 [hidden], before the head.
        head: [V, hidden].
        heads, kv_heads, head_dim: of attention, in every layer.
        activation: a key of ACTIVATIONS.
        epsilon: of all norms.
        residual_scale: multiplies what a block adds to the residual stream.
        logit_scale, logit_softcap: logits * scale, then cap * tanh(logits / cap) if the cap is above 0.
    """

    embedding: Tensor
    layers: Sequence[DecoderLayer]
    ropes: Sequence[Rope]
    norm: Tensor
    head: Projection
    heads: int
    kv_heads: int
    head_dim: int
    activation: str
    epsilon: float
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0


class NativeDecoder:
    """Runs batches against paged caches."""

    def __init__(
        self, model: DecoderModel, key_caches: Sequence[Cache], value_caches: Sequence[Cache], activation_bits: int = 0
    ) -> None:
        """
        Args:
            model: kept alive, like the caches. Native kernels must exist (`library.load()` is not None).
            key_caches, value_caches: per layer, [num_blocks, block_size, kv_heads, head_dim], plain or quantized.
            activation_bits: 4 or 8 quantizes the inputs of packed weights, see `layers.quantized_activations`; 0 does not.
        """
        lib = library.load()
        assert lib is not None, "no native kernels"
        assert len(model.layers) == len(key_caches) == len(value_caches)
        self._library, self._model, self._caches = lib, model, (*key_caches, *value_caches)
        self._block_size, self._tail_page_ids = key_caches[0].shape[1], structs.tail_page_ids(key_caches[0])
        pairs = zip(model.layers, zip(key_caches, value_caches, strict=True), strict=True)
        layers = [_layer(model, layer, keys, values, activation_bits) for layer, (keys, values) in pairs]
        self._layers = (structs.Layer * len(layers))(*layers)
        ropes = [structs.Rope(_floats(rope.frequencies), len(rope.frequencies), rope.scaling) for rope in model.ropes]
        self._ropes = (structs.Rope * len(ropes))(*ropes)
        self._decoder = structs.Decoder(
            embedding=structs.address(model.embedding),
            layers=ctypes.addressof(self._layers),
            ropes=ctypes.addressof(self._ropes),
            norm=_floats(model.norm),
            head=_matrix(model.head, head_bits(activation_bits)),
            layer_count=len(layers),
            rope_count=len(ropes),
            hidden_size=model.embedding.shape[1],
            intermediate_size=model.layers[0].down.weight.shape[1],
            activation=ACTIVATIONS[model.activation],
            embedding_type=structs.TYPES[model.embedding.dtype],
            epsilon=model.epsilon,
            residual=model.residual_scale,
            embedding_scale=model.embedding_scale,
        )

    def forward(self, batch: Batch, draft: bool = False) -> Tensor:
        """Write the batch's keys and values to their slots; returns logits, float32 [R, V], with R at most T.

        With `draft`, attention reads only the upper plane of 4+4-bit caches.
        """
        model, tokens, rows = self._model, len(batch.token_ids), len(batch.logit_rows)
        logits = torch.empty(rows, model.head.weight.shape[0])
        sequences, table_width = batch.block_table.shape
        paged = structs.PagedBatch(
            block_table=structs.address(batch.block_table),
            query_start=structs.address(batch.query_start),
            lengths=structs.address(batch.seq_lens),
            tail_page_ids=self._tail_page_ids,
            sequences=sequences,
            table_width=table_width,
            block_size=self._block_size,
            draft=draft,
        )
        queries, measured = self._queries(batch)
        call = structs.Batch(
            paged=paged,
            token_ids=structs.address(batch.token_ids),
            positions=structs.address(batch.positions),
            slots=structs.address(batch.slot_mapping),
            logit_rows=structs.address(batch.logit_rows),
            tokens=tokens,
            rows=rows,
            measured=structs.address(measured),
            queries=structs.address(queries),
            measured_count=len(measured),
        )
        out = c_void_p(logits.data_ptr())
        if self._library.quantkit_decoder_forward(byref(self._decoder), byref(call), out, library.threads()):
            raise MemoryError(f"no memory for a forward of {tokens} tokens")
        if batch.attention_mass is not None:
            # The caches of keys come first.
            for layer, keys, of_layer in zip(model.layers, self._caches, queries, strict=False):
                shape = {"scale": layer.scale, "window": layer.window, "softcap": layer.softcap, "sinks": layer.sinks}
                measure(batch, of_layer, keys, **shape)
        if model.logit_scale != 1.0:
            logits *= model.logit_scale
        return logits.div_(model.logit_softcap).tanh_().mul_(model.logit_softcap) if model.logit_softcap > 0 else logits

    def _queries(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """A buffer for every layer's queries of the measured tokens, float32 [layers, O, heads, head_dim]; their rows."""
        model = self._model
        rows = torch.empty(0, dtype=torch.int64) if batch.attention_mass is None else batch.attention_mass.rows
        return torch.empty(len(model.layers), len(rows), model.heads, model.head_dim), rows


def _layer(model: DecoderModel, layer: DecoderLayer, keys: Cache, values: Cache, activation_bits: int) -> structs.Layer:
    queries, width = model.heads * model.head_dim, model.head_dim
    assert layer.qkv.weight.shape[0] == queries + 2 * model.kv_heads * width
    assert layer.out.weight.shape[1] == queries
    assert not any(projection.hadamard for projection in (layer.qkv, layer.out, layer.gate_up, model.head))
    assert keys.shape == values.shape
    assert keys.shape[2:] == (model.kv_heads, width)
    assert structs.cache_type(keys) == structs.cache_type(values)
    all_heads = layer.query_norm is not None and len(layer.query_norm) != width
    attention = structs.AttentionConfig(
        sinks=_floats(layer.sinks),
        heads=model.heads,
        kv_heads=model.kv_heads,
        dim=width,
        value_dim=width,
        window=layer.window,
        type=structs.cache_type(keys),
        scale=layer.scale,
        softcap=layer.softcap,
    )
    return structs.Layer(
        qkv=_matrix(layer.qkv, activation_bits),
        out=_matrix(layer.out, activation_bits),
        gate_up=_matrix(layer.gate_up, activation_bits),
        down=_matrix(layer.down, activation_bits),
        pre_attention_norm=_floats(layer.pre_attention_norm),
        post_attention_norm=_floats(layer.post_attention_norm),
        pre_mlp_norm=_floats(layer.pre_mlp_norm),
        post_mlp_norm=_floats(layer.post_mlp_norm),
        query_norm=_floats(layer.query_norm),
        key_norm=_floats(layer.key_norm),
        attention=attention,
        norm_all_heads=all_heads,
        rope=layer.rope,
        down_hadamard=layer.down.hadamard,
        keys=structs.kv_arrays(keys),
        values=structs.kv_arrays(values),
    )


def _matrix(projection: Projection, activation_bits: int) -> structs.Matrix:
    assert projection.bias is None or projection.bias.dtype == torch.float32
    bits = activation_bits if projection.weight.layout == "tiles" else 0
    return projection.weight.matrix(projection.bias, bits, projection.column_perm)


def _floats(vector: Tensor | None) -> int | None:
    assert vector is None or vector.dtype == torch.float32
    return structs.address(vector)
