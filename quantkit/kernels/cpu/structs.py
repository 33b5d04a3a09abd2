"""The C structures of the native kernels, field for field: matmul.h, attention.h, decoder.c."""

import ctypes

import torch
from torch import Tensor

from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV

_POINTER, _INT, _WORD, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float

#: Element types of dense matrices and caches (vec.h).
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: Further types of caches.
_FP8, _INT8, _INT4 = 3, 4, 5


class Matrix(ctypes.Structure):
    """A weight [rows, columns], packed or dense."""

    _fields_ = [
        *((name, _POINTER) for name in ("data", "scales", "zeros", "bias", "order")),
        *((name, _INT) for name in ("rows", "columns", "group")),
        *((name, _WORD) for name in ("bits", "type", "input_bits", "zero")),
    ]


class Pages(ctypes.Structure):
    """Block tables and lengths of a batch."""

    _fields_ = [
        *((name, _POINTER) for name in ("block_table", "query_start", "lengths", "open_pages")),
        *((name, _INT) for name in ("sequences", "table_width", "block_size", "draft")),
    ]


class Store(ctypes.Structure):
    """Keys or values of a layer."""

    _fields_ = [*((name, _POINTER) for name in ("data", "params", "lower", "open"))]


class Heads(ctypes.Structure):
    """Shape of an attention layer."""

    _fields_ = [
        ("sinks", _POINTER),
        *((name, _INT) for name in ("heads", "kv_heads", "dim", "value_dim", "window", "type")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
    ]


class Layer(ctypes.Structure):
    """A decoder block."""

    _fields_ = [
        *((name, Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, _POINTER) for name in ("norm_attention", "norm_attention_out", "norm_mlp", "norm_mlp_out")),
        *((name, _POINTER) for name in ("norm_query", "norm_key")),
        ("heads", Heads),
        *((name, _INT) for name in ("norm_all_heads", "rope", "down_hadamard")),
        *((name, Store) for name in ("keys", "values")),
    ]


class Rope(ctypes.Structure):
    """A rotary position embedding."""

    _fields_ = [
        ("frequencies", _POINTER),
        ("pairs", _INT),
        ("scaling", _FLOAT),
    ]


class Decoder(ctypes.Structure):
    """All blocks, the last norm and the head."""

    _fields_ = [
        *((name, _POINTER) for name in ("embedding", "layers", "ropes", "norm")),
        ("head", Matrix),
        *((name, _INT) for name in ("layer_count", "rope_count", "hidden", "inner", "activation", "embedding_type")),
        *((name, _FLOAT) for name in ("epsilon", "residual", "embedding_scale")),
    ]


class Batch(ctypes.Structure):
    """Tokens of one forward."""

    _fields_ = [
        ("pages", Pages),
        *((name, _POINTER) for name in ("token_ids", "positions", "slots", "logit_rows")),
        *((name, _INT) for name in ("tokens", "rows")),
        *((name, _POINTER) for name in ("measured", "queries")),
        ("measured_count", _INT),
    ]


def store(cache: Cache) -> Store:
    """What the native kernels take. It borrows: the caller keeps the cache alive."""
    if isinstance(cache, Tensor):
        return Store(address(cache), None, None, None)
    assert cache.tail_pages is None or cache.tail_pages.dtype == torch.bfloat16
    return Store(*(address(tensor) for tensor in (cache.codes, cache.params, cache.lower, cache.tail_pages)))


def kind(cache: Cache) -> int:
    """The number of its type in vec.h."""
    if isinstance(cache, QuantizedKV):
        return _INT8 if cache.tail_pages is None else _INT4
    return _FP8 if cache.dtype == torch.float8_e4m3fn else TYPES[cache.dtype]


def tail_page_ids(cache: Cache) -> int | None:
    """Address of the table of open pages; None (NULL) where there is none."""
    return address(cache.tail_page_ids) if isinstance(cache, QuantizedKV) else None


def address(tensor: Tensor | None) -> int | None:
    """Where a contiguous CPU tensor begins; None (NULL) for None. The caller keeps the tensor alive."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
    return tensor.data_ptr()
