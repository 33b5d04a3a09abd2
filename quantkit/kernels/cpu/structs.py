"""The C structures of the native kernels, field for field: matrix.h, kv_cache.h, decoder.h."""

import ctypes

import torch
from torch import Tensor

from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

_POINTER, _INT, _WORD, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

#: Element types of dense matrices and caches (vec.h).
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Further element types, which only caches have.
_FP8, _INT8, _INT4 = 3, 4, 5


class Matrix(ctypes.Structure):
    """A weight [rows, columns], packed or dense."""

    _fields_ = [
        *((name, _POINTER) for name in ("data", "scales", "zeros", "bias", "column_perm")),
        *((name, _INT) for name in ("rows", "columns", "group")),
        *((name, _WORD) for name in ("bits", "type", "activation_bits", "zero")),
    ]


class PagedBatch(ctypes.Structure):
    """Block tables and lengths of the sequences of a batch."""

    _fields_ = [
        *((name, _POINTER) for name in ("block_table", "query_start", "lengths", "tail_page_ids")),
        *((name, _INT) for name in ("sequences", "table_width", "block_size", "draft")),
    ]


class KVArrays(ctypes.Structure):
    """The arrays that hold the keys, or the values, of a layer."""

    _fields_ = [*((name, _POINTER) for name in ("data", "params", "lower", "tail_pages"))]


class AttentionConfig(ctypes.Structure):
    """Shape and settings of an attention layer."""

    _fields_ = [
        ("sinks", _POINTER),
        *((name, _INT) for name in ("heads", "kv_heads", "dim", "value_dim", "window", "type")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
    ]


class Layer(ctypes.Structure):
    """A decoder block."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("pre_attention_norm", "post_attention_norm", "pre_mlp_norm", "post_mlp_norm")),
        *((name, _POINTER) for name in ("query_norm", "key_norm")),
        ("attention", AttentionConfig),
        *((name, _INT) for name in ("norm_all_heads", "rope", "down_hadamard")),
        *((name, KVArrays) for name in ("keys", "values")),
    ]


class Rope(ctypes.Structure):
    """A rotary position embedding."""

    _fields_ = [
        ("frequencies", _POINTER),
        ("pairs", _INT),
        ("scaling", _FLOAT),
    ]


class Decoder(ctypes.Structure):
    """All decoder blocks, the final norm and the output head."""

    _fields_ = [
        *((name, _POINTER) for name in ("embedding", "layers", "ropes", "norm")),
        ("head", Matrix),
        *(
            (name, _INT)
            for name in ("layer_count", "rope_count", "hidden_size", "intermediate_size", "activation", "embedding_type")
        ),
        *((name, _FLOAT) for name in ("epsilon", "residual", "embedding_scale")),
    ]


class Batch(ctypes.Structure):
    """The tokens of one forward pass."""

    _fields_ = [
        ("paged", PagedBatch),
        *((name, _POINTER) for name in ("token_ids", "positions", "slots", "logit_rows")),
        *((name, _INT) for name in ("tokens", "rows")),
        *((name, _POINTER) for name in ("measured", "queries")),
        ("measured_count", _INT),
    ]


def kv_arrays(cache: Cache) -> KVArrays:
    """A cache as the native kernels take it. It holds addresses only: the caller keeps the cache alive."""
    if isinstance(cache, Tensor):
        return KVArrays(address(cache), None, None, None)
    assert cache.tail_pages is None or cache.tail_pages.dtype == torch.bfloat16
    return KVArrays(*(address(tensor) for tensor in (cache.codes, cache.params, cache.lower, cache.tail_pages)))


def cache_type(cache: Cache) -> int:
    """The number of its element type in vec.h."""
    if isinstance(cache, QuantizedKV):
        return _INT8 if cache.tail_pages is None else _INT4
    return _FP8 if cache.dtype == torch.float8_e4m3fn else TYPES[cache.dtype]


def tail_page_ids(cache: Cache) -> int | None:
    """Address of the cache's `tail_page_ids`; None (NULL) if it has none."""
    return address(cache.tail_page_ids) if isinstance(cache, QuantizedKV) else None


def address(tensor: Tensor | None) -> int | None:
    """Address of a contiguous CPU tensor; None (NULL) for None. The caller keeps the tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()
