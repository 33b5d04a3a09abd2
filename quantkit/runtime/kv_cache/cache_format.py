"""The format that a KV dtype takes for one model on one device.

`cache_format` resolves a choice of `--kv-dtype` into a `CacheFormat`, which allocates the tensors of a layer. All sizes are
computed from these tensors, on the meta device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.kernels.layouts.quantized_kv import Cache
from quantkit.runtime.kv_cache.dtype_base import KVDtype, LayerShape, TailStorage, Tokens
from quantkit.runtime.kv_cache.dtypes import KV_DTYPES, require_kv_dtype


@dataclass(frozen=True)
class CacheFormat:
    """A KV dtype as it is stored for one model on one device.

    Attributes:
        name: as the user sees it.
        kind: the choice of `--kv-dtype`.
        dtype: of unquantized numbers, or of tail pages, which are 16-bit.
    """

    name: str
    kind: KVDtype
    dtype: torch.dtype

    @property
    def has_tail_pages(self) -> bool:
        """See `KVDtype`."""
        return self.kind.has_tail_pages

    @property
    def block_size(self) -> int:
        """Tokens per block where the user chooses none."""
        return self.kind.block_size

    def layer(
        self, shape: LayerShape, num_blocks: int, block_size: int, device: torch.device, tail: TailStorage | None
    ) -> tuple[Cache, Cache]:
        """Keys and values of one layer, uninitialized.

        Args:
            shape: of the layer.
            num_blocks, block_size: of the cache.
            device: where the cache is; on the meta device only sizes are right.
            tail: given if the format has tail pages.
        """
        tokens = Tokens(num_blocks, block_size, shape.heads)
        keys = self.kind.allocate(tokens, shape.key_width, self.dtype, device, keys=True, tail=tail)
        values = self.kind.allocate(tokens, shape.value_width, self.dtype, device, keys=False, tail=tail)
        return keys, values

    def block_bytes(self, layers: Sequence[LayerShape], block_size: int) -> int:
        """Bytes per block over all layers, without tail pages."""
        return self._bytes(layers, block_size, blocks=1, pages=0)

    def tail_page_bytes(self, layers: Sequence[LayerShape], block_size: int) -> int:
        """Bytes per tail page over all layers; 0 if the format has none."""
        return self._bytes(layers, block_size, blocks=0, pages=1) if self.has_tail_pages else 0

    def _bytes(self, layers: Sequence[LayerShape], block_size: int, blocks: int, pages: int) -> int:
        meta = torch.device("meta")
        tail = TailStorage(pages, torch.empty(blocks, dtype=torch.int32, device=meta)) if self.has_tail_pages else None
        caches = (self.layer(layer, blocks, block_size, meta, tail) for layer in layers)
        return sum(cache.nbytes for pair in caches for cache in pair)


def cache_format(
    name: str | torch.dtype, declared: torch.dtype, layers: Sequence[LayerShape], device: torch.device
) -> CacheFormat:
    """The format that `--kv-dtype` selects.

    Args:
        name: a name in `KV_DTYPES`, or the dtype of unquantized numbers.
        declared: the checkpoint's dtype.
        layers: what is to be stored.
        device: where the cache will be.

    Raises:
        ResourceError: there is no such KV dtype, or this device or heads of these widths cannot have it.
    """
    require_kv_dtype(name)
    if isinstance(name, torch.dtype):
        return plain(name)
    kind = KV_DTYPES[name]
    dtype = kind.storage_dtype(declared, layers, device)
    return CacheFormat(kind.label(name, dtype), kind, dtype)


def plain(dtype: torch.dtype) -> CacheFormat:
    """Unquantized numbers of type `dtype`."""
    kind = KV_DTYPES["auto"]
    return CacheFormat(kind.label("auto", dtype), kind, dtype)
