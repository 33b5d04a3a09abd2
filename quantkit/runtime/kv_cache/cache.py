"""The paged key/value cache, sized from the memory that may be used.

Plain and int8 caches hold each token for itself. An int4 block is quantized as a whole, from a 16-bit open page:

- a block has a page from the step that first writes to it until a step of the same sequence, not a draft, begins behind it;
- between steps, what lies in a block before a sequence's length is final; what is behind it (rejected drafts) is overwritten;
- a block's quantized form is that of the tokens of whoever reads it, since readers stand behind the block's last slot, whose
  write quantized it. So full blocks may be shared, published and copied like any other, without their pages;
- a block that is not full is never published; where two samples share one, it is copied with its page before either writes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from quantkit.errors import ResourceError
from quantkit.kernels.layouts.quantized_kv import Cache, QuantizedKV, block_tensors
from quantkit.runtime.core.batch import Batch
from quantkit.runtime.kv_cache.dtypes import CacheFormat, LayerShape
from quantkit.runtime.kv_cache.tail_pages import TailPages
from quantkit.utils.resources import available_memory


class KVCache:
    """Keys and values of all layers.

    Attributes:
        keys, values: per layer, [num_blocks, block_size, heads, width], plain or quantized.
        format: how they are stored.
        block_size: tokens in a block.
        num_blocks: blocks; every layer has all of them, so that one block table serves all layers.
        device: where they lie.
        block_bytes: size of a block over all layers, without open pages.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        format: CacheFormat,
        device: torch.device,
        pages: int = 0,
    ) -> None:
        """`pages`: open pages, where the format has them; see `open_pages.pages_needed`."""
        self.format, self.device = format, device
        self.num_blocks, self.block_size = num_blocks, block_size
        self._open = TailPages(num_blocks, block_size, pages, device) if format.paged else None
        table = None if self._open is None else self._open.table
        both = [format.layer(layer, num_blocks, block_size, device, table, pages) for layer in layers]
        self.keys: list[Cache] = [keys for keys, _ in both]
        self.values: list[Cache] = [values for _, values in both]

        self._planes = [
            plane.view(torch.uint8)  # Whatever its type, it can be indexed so.
            for cache in (*self.keys, *self.values)
            for plane in block_tensors(cache)
        ]
        self.block_bytes = sum(plane.nbytes for plane in self._planes) // num_blocks

    @property
    def bytes_per_token(self) -> float:
        """Bytes that a token takes, open pages not counted."""
        return self.block_bytes / self.block_size

    @property
    def nbytes(self) -> int:
        """Size in bytes, open pages included."""
        return sum(cache.nbytes for cache in (*self.keys, *self.values))

    @property
    def open_bytes(self) -> int:
        """Size of the open pages in bytes."""
        return self.nbytes - self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens that it holds."""
        return self.num_blocks * self.block_size

    def prepare(self, batch: Batch, draft: bool) -> None:
        """Make ready for a step's writes; called before every forward."""
        if self._open is not None:
            self._open.prepare(batch.kv_spans, draft)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer; a source that is another pair's target stands before it."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.device).unbind(1)
        for plane in self._planes:
            plane[target] = plane[source]
        pages = [] if self._open is None else self._open.copy(pairs)
        for cache in (*self.keys, *self.values):
            for old, new in pages:
                assert isinstance(cache, QuantizedKV)
                assert cache.tail_pages is not None
                cache.tail_pages[new] = cache.tail_pages[old]

    def export_block(self, block: int) -> Tensor:
        """A copy of all bytes of a full block, uint8 [block_bytes], on the cache's device."""
        return torch.cat([plane[block].view(-1) for plane in self._planes])

    def import_block(self, block: int, data: Tensor) -> None:
        """Set all bytes of a block from uint8 [block_bytes] on the cache's device."""
        parts = [plane[block].view(-1) for plane in self._planes]
        for part, piece in zip(parts, data.split([len(part) for part in parts]), strict=True):
            part.copy_(piece)


def blocks_for(
    layers: Sequence[LayerShape],
    block_size: int,
    format: CacheFormat,
    memory: int,
    longest: int,
    max_batch: int,
    apart: int,
    option: str,
    source: str,
) -> int:
    """How many blocks to allocate: what `memory` bytes hold, but no more than max_batch sequences could use.

    Args:
        layers, block_size, format: of the cache.
        memory: bytes.
        longest: tokens that one sequence holds at most.
        max_batch: sequences at a time.
        apart: bytes of the memory that are not for blocks.
        option: what set `longest`.
        source: what `memory` is to the user.

    Raises:
        ResourceError: not even one sequence fits.
    """
    size = format.block_bytes(layers, block_size)
    one = -(-longest // block_size)
    count = min((memory - apart) // size, one * max_batch)
    if count < one:
        fits = max(0, memory - apart) // size * block_size
        raise ResourceError(
            f"{source} of {memory / 2**20:.0f} MiB holds {fits:,} tokens, one request of {option} {longest:,} "
            f"needs {(one * size + apart) / 2**20:.0f} MiB; give more memory or lower {option}"
        )
    return count


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def require_free(wanted: int, device: torch.device, beside: int) -> None:
    """Refuse a cache of `wanted` bytes where, beside other `beside` bytes, there are not so many.

    Raises:
        ResourceError: it would not fit. On a CPU nothing else would say so before its pages are written to.
    """
    free = max(0, free_memory(device) - beside)
    if wanted > free:
        found = f"there are {free / 2**30:.1f} GiB of free memory and the cache would take {wanted / 2**30:,.1f}"
        raise ResourceError(f"--kv-memory: {found}; ask for less, or lower --max-batch or --max-model-len")
