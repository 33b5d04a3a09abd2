"""The tensors of the paged key/value cache.

Unquantized and int8 caches store each token by itself. An int4 block is quantized as a whole, from a 16-bit tail page:

- A block has a tail page from the step that first writes to it until a step of its sequence, not a draft, begins after it.
- Between steps, the slots of a block before a sequence's length are final; those after it (rejected drafts) are overwritten.
- Whoever reads the quantized form of a block comes after the block's last slot, and writing that slot quantized the block. So
  the quantized form is that of the tokens that the reader expects, and full blocks may be shared, published and copied without
  their tail pages.
- A block that is not full is never published. Where two samples share one, it is copied together with its tail page before
  either sample writes to it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV, block_tensors
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.cache_format import CacheFormat
from quantkit.runtime.kv_cache.dtype_base import LayerShape, TailStorage
from quantkit.runtime.kv_cache.tail_pages import TailPages


class KVCache:
    """Keys and values of all layers.

    Attributes:
        keys, values: per layer, [num_blocks, block_size, heads, width], plain or quantized.
        format: how they are stored.
        block_size: tokens per block.
        num_blocks: blocks. Every layer has all of them, so one block table serves all layers.
        device: where the tensors are.
        block_bytes: bytes per block over all layers, without tail pages.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        format: CacheFormat,
        device: torch.device,
        tail_pages: int = 0,
    ) -> None:
        """
        Args:
            layers, num_blocks, block_size, format, device: see the class.
            tail_pages: how many, where the format has them; see `tail_pages.tail_pages_needed`.
        """
        self.format, self.device = format, device
        self.num_blocks, self.block_size = num_blocks, block_size
        self._tail = TailPages(num_blocks, block_size, tail_pages, device) if format.has_tail_pages else None
        storage = None if self._tail is None else TailStorage(tail_pages, self._tail.table)
        both = [format.layer(layer, num_blocks, block_size, device, storage) for layer in layers]
        self.keys: list[Cache] = [keys for keys, _ in both]
        self.values: list[Cache] = [values for _, values in both]

        self._block_tensors = [
            tensor.view(torch.uint8)  # Bytes can be indexed whatever the dtype is.
            for cache in (*self.keys, *self.values)
            for tensor in block_tensors(cache)
        ]
        self.block_bytes = sum(tensor.nbytes for tensor in self._block_tensors) // num_blocks

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token, without tail pages."""
        return self.block_bytes / self.block_size

    @property
    def nbytes(self) -> int:
        """Size in bytes, tail pages included."""
        return sum(cache.nbytes for cache in (*self.keys, *self.values))

    @property
    def tail_bytes(self) -> int:
        """Size of the tail pages in bytes."""
        return self.nbytes - self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that the cache has room for."""
        return self.num_blocks * self.block_size

    def prepare(self, batch: Batch, draft: bool) -> None:
        """Give every block that a step writes to its tail page, if the format has them. Called before every forward."""
        if self._tail is not None:
            self._tail.prepare(batch.kv_spans, draft)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (source, target) each, in every layer; a source that is another pair's target comes before it."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.device).unbind(1)
        for tensor in self._block_tensors:
            tensor[target] = tensor[source]
        pages = [] if self._tail is None else self._tail.copy(pairs)
        for cache in (*self.keys, *self.values):
            for old, new in pages:
                assert isinstance(cache, QuantizedKV)
                assert cache.tail_pages is not None
                cache.tail_pages[new] = cache.tail_pages[old]

    def export_block(self, block: int) -> Tensor:
        """A copy of all bytes of a full block, uint8 [block_bytes], on the cache's device."""
        return torch.cat([tensor[block].view(-1) for tensor in self._block_tensors])

    def import_block(self, block: int, data: Tensor) -> None:
        """Set all bytes of a block from uint8 [block_bytes] on the cache's device."""
        parts = [tensor[block].view(-1) for tensor in self._block_tensors]
        for part, piece in zip(parts, data.split([len(part) for part in parts]), strict=True):
            part.copy_(piece)
