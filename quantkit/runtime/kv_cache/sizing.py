"""How many blocks a cache gets: computed from the memory that may be used, before anything is allocated."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.errors import ResourceError
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.kv_cache.cache_format import CacheFormat, cache_format
from quantkit.runtime.kv_cache.dtype_base import LayerShape
from quantkit.runtime.kv_cache.options import CacheOptions
from quantkit.runtime.kv_cache.tail_pages import tail_pages_needed
from quantkit.utils.resources import available_memory

#: The share of the free memory that the cache takes if `--kv-memory` is not given.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class CachedModel:
    """What a cache must know about the model that it serves.

    Attributes:
        layers: what each layer stores per token.
        dtype: the checkpoint's dtype. On a CPU activations are wider, but a wider cache would only be slower.
        context: longest sequence in tokens that the model can handle.
        device: where the cache will be.
    """

    layers: Sequence[LayerShape]
    dtype: torch.dtype
    context: int
    device: torch.device


@dataclass(frozen=True)
class BlockLayout:
    """The blocks of a cache, but not yet how many there are.

    Attributes:
        format: how numbers are stored.
        block_size: tokens per block.
        block_bytes: bytes per block over all layers, without tail pages.
        tail_pages: number of tail pages.
        tail_bytes: bytes of all tail pages.
    """

    format: CacheFormat
    block_size: int
    block_bytes: int
    tail_pages: int
    tail_bytes: int

    @classmethod
    def of(cls, model: CachedModel, options: CacheOptions) -> "BlockLayout":
        """The layout that the options select for a model.

        Raises:
            ResourceError: there is no such KV dtype, or not for this model or device.
        """
        format = cache_format(options.dtype, model.dtype, model.layers, model.device)
        block_size = options.block_size or format.block_size
        pages = tail_pages_needed(block_size, options.max_batch, options.step_tokens) if format.has_tail_pages else 0
        return cls(
            format=format,
            block_size=block_size,
            block_bytes=format.block_bytes(model.layers, block_size),
            tail_pages=pages,
            tail_bytes=pages * format.tail_page_bytes(model.layers, block_size),
        )


@dataclass(frozen=True)
class CachePlan:
    """A cache that fits into memory.

    Attributes:
        layout: of its blocks.
        num_blocks: how many.
        max_model_len: longest sequence in tokens.
    """

    layout: BlockLayout
    num_blocks: int
    max_model_len: int

    def allocate(self, model: CachedModel) -> KVCache:
        """The cache, uninitialized."""
        layout = self.layout
        return KVCache(
            model.layers, self.num_blocks, layout.block_size, layout.format, model.device, tail_pages=layout.tail_pages
        )


def plan_cache(model: CachedModel, options: CacheOptions, other_bytes: int = 0) -> CachePlan:
    """Size a cache: as many blocks as the memory holds, but no more than `max_batch` sequences could use.

    Args:
        model: which the cache serves.
        options: what the user asks for.
        other_bytes: bytes that are allocated for other caches, though the system still counts them as free.

    Raises:
        ResourceError: the cache cannot hold one sequence of max_model_len, cannot have the dtype, or is larger than the free
            memory.
    """
    layout, memory = BlockLayout.of(model, options), cache_memory(options, model.device)
    max_model_len = _max_model_len(model, options, layout, memory)
    capacity = options.budget.capacity(layout.block_size)
    longest, option = min((max_model_len, "--max-model-len"), (capacity, "--kv-budget"))
    per_sequence = -(-longest // layout.block_size)
    num_blocks = min((memory - layout.tail_bytes) // layout.block_bytes, per_sequence * options.max_batch)
    if num_blocks < per_sequence:
        fits = max(0, memory - layout.tail_bytes) // layout.block_bytes * layout.block_size
        needed = per_sequence * layout.block_bytes + layout.tail_bytes
        raise ResourceError(
            f"{options.memory_source} of {memory / 2**20:.0f} MiB holds {fits:,} tokens, one request of {option} {longest:,} "
            f"needs {needed / 2**20:.0f} MiB; give more memory or lower {option}"
        )
    _require_free(layout.tail_bytes + num_blocks * layout.block_bytes, model.device, other_bytes)
    return CachePlan(layout, num_blocks, max_model_len)


def cache_memory(options: CacheOptions, device: torch.device) -> int:
    """Bytes for the cache."""
    return int(_CACHE_SHARE * _free_memory(device)) if options.memory is None else options.memory


def draft_share(memory: int, main: BlockLayout, draft: BlockLayout) -> int:
    """Bytes of `memory` for a draft model's cache, so that it holds as many tokens as the main model's."""
    per_main, per_draft = main.block_bytes * draft.block_size, draft.block_bytes * main.block_size
    return max(0, memory - main.tail_bytes) * per_draft // (per_main + per_draft)


def _max_model_len(model: CachedModel, options: CacheOptions, layout: BlockLayout, memory: int) -> int:
    """Longest sequence in tokens.

    Raises:
        ResourceError: the user wants it longer than the model's context, or not even one block fits.
    """
    if options.max_model_len is not None:
        if options.max_model_len > model.context:
            asked = f"--max-model-len {options.max_model_len:,}"
            raise ResourceError(f"{asked} is longer than the model's context of {model.context:,}")
        return options.max_model_len
    fits = (memory - layout.tail_bytes) // layout.block_bytes * layout.block_size
    if fits <= 0:
        pages = f" next to {layout.tail_bytes:,} bytes of tail pages" if layout.tail_bytes else ""
        found = f"{options.memory_source} of {memory:,} bytes does not hold a block of {layout.block_size} tokens{pages}"
        raise ResourceError(f"{found}; give more")
    return model.context if options.budget.capacity(layout.block_size) <= fits else min(model.context, fits)


def _free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _require_free(wanted: int, device: torch.device, other_bytes: int) -> None:
    """Refuse a cache that does not fit. On a CPU nothing else would say so before its pages are written to.

    Raises:
        ResourceError: less than `wanted` bytes are free after `other_bytes` are taken.
    """
    free = max(0, _free_memory(device) - other_bytes)
    if wanted > free:
        found = f"there are {free / 2**30:.1f} GiB of free memory and the cache would take {wanted / 2**30:,.1f}"
        raise ResourceError(f"--kv-memory: {found}; ask for less, or lower --max-batch or --max-model-len")
