"""Paged attention as an attention implementation of transformers.

Batch metadata and caches reach it through the model's keyword arguments (`attention_context=...`), never through a global.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from quantkit.kernels.attention_mass import attention_mass
from quantkit.kernels.cpu import attention as cpu_attention
from quantkit.kernels.layouts.quantized_kv import Cache
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.cache import KVCache

#: Name of the implementation.
KEY = "quantkit_paged"


@dataclass(frozen=True)
class AttentionContext:
    """What every layer's attention needs in addition to query, key and value.

    Attributes:
        batch: on the model's device.
        cache: where keys and values are.
        draft: see `ModelRunner.forward`.
    """

    batch: Batch
    cache: KVCache
    draft: bool = False


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    attention_context: AttentionContext,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the keys and values of a step to the cache, and attend to the whole context.

    Args:
        module: the attention layer; its `layer_idx` picks the cache.
        query: [1, Hq, T, D]; key: [1, Hkv, T, D]; value: [1, Hkv, T, Dv], all sequences' new tokens packed.
        attention_context: the batch and the cache.
        scaling, sliding_window, softcap, s_aux: parameters of the model's attention; None if it has none.

    Returns:
        [1, T, Hq, Dv], and no attention weights.
    """
    layer, batch = module.layer_idx, attention_context.batch
    assert isinstance(layer, int)
    keys, values = attention_context.cache.keys[layer], attention_context.cache.values[layer]
    write, run = _kernels(query.device.type, batch.max_query_len)
    write(key[0].transpose(0, 1), value[0].transpose(0, 1), keys, values, batch.slot_mapping)
    shape: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "window": sliding_window or 0,
        "softcap": softcap or 0.0,
        "sinks": None if s_aux is None else s_aux.float(),
    }
    queries = query[0].transpose(0, 1)
    tables = batch.block_table, batch.query_start, batch.seq_lens
    out = run(queries, keys, values, *tables, **shape, draft=attention_context.draft)
    if batch.attention_mass is not None:
        measure(batch, queries[batch.attention_mass.rows], keys, **shape)
    return out[None], None


def measure(batch: Batch, queries: Tensor, keys: Cache, **shape: Any) -> None:
    """Add one layer's attention of the measured tokens to `batch.attention_mass`.

    Args:
        batch: with an `attention_mass`.
        queries: [O, Hq, D], of the measured tokens.
        keys: the layer's cached keys.
        **shape: see `kernels.gpu.attention.attention_mass`.
    """
    assert batch.attention_mass is not None
    which = batch.attention_mass.sequences
    batch.attention_mass.mass.add_(attention_mass(queries, keys, batch.block_table[which], batch.seq_lens[which], **shape))


def _kernels(device: str, max_query_len: int) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """The kernels of a device: one writes to the cache, the other attends."""
    if device == "cpu":
        return cpu_attention.kv_write, cpu_attention.paged_attention
    from quantkit.kernels.gpu.attention.paged_attention import paged_attention
    from quantkit.kernels.gpu.kv.kv_write import kv_write  # Triton is slow to import and exists on Linux only.

    return kv_write, partial(paged_attention, max_query_len=max_query_len)


def register() -> str:
    """Register the implementation with transformers; returns its name."""
    from transformers import AttentionInterface  # Imports its modelling code, which the native decoder does without.

    AttentionInterface.register(KEY, attend)
    return KEY
