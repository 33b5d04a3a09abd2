"""The paged key/value cache: two tensors a layer, sized from the memory that may be used."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.errors import ResourceError


@dataclass(frozen=True)
class LayerShape:
    """What one layer stores per token: KV heads, and the width of a key and of a value head."""

    heads: int
    key_width: int
    value_width: int

    @property
    def values(self) -> int:
        """Numbers stored per token."""
        return self.heads * (self.key_width + self.value_width)


class KVCache:
    """Keys and values of all layers.

    Attributes:
        keys, values: per layer, [num_blocks, block_size, heads, width].
        block_size: tokens in a block.
        num_blocks: blocks; every layer has all of them, so that one block table serves all layers.
        device: where they are.
        block_bytes: size of a block over all layers.
    """

    def __init__(
        self, layers: Sequence[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size

        def blocks(heads: int, width: int) -> Tensor:
            return torch.empty(num_blocks, block_size, heads, width, dtype=dtype, device=device)

        self.keys = [blocks(layer.heads, layer.key_width) for layer in layers]
        self.values = [blocks(layer.heads, layer.value_width) for layer in layers]
        self.device, self.block_bytes = device, self.nbytes // num_blocks

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks, (from, to) each, in every layer; no block is both read and written."""
        if not pairs:
            return
        source, target = torch.tensor(pairs, device=self.keys[0].device).unbind(1)
        for tensor in (*self.keys, *self.values):
            tensor[target] = tensor[source]

    def export_block(self, block: int) -> Tensor:
        """A copy of all bytes of a block, uint8 [block_bytes], on the cache's device."""
        return torch.cat(self._bytes(block))

    def import_block(self, block: int, data: Tensor) -> None:
        """Set all bytes of a block from uint8 [block_bytes] on the cache's device."""
        parts = self._bytes(block)
        for part, piece in zip(parts, data.split([len(part) for part in parts]), strict=True):
            part.copy_(piece)

    def _bytes(self, block: int) -> list[Tensor]:
        """A block's part of every tensor, as a view of bytes."""
        return [tensor[block].view(-1).view(torch.uint8) for tensor in (*self.keys, *self.values)]


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return block_size * dtype.itemsize * sum(layer.values for layer in layers)


def blocks_for(
    layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype, memory: int, longest: int, max_batch: int, option: str
) -> int:
    """How many blocks to allocate: what `memory` bytes hold, but no more than max_batch sequences could use.

    Args:
        layers, block_size, dtype: of the cache.
        memory: bytes.
        longest: tokens that one sequence holds at most.
        max_batch: sequences at a time.
        option: what set `longest`.

    Raises:
        ResourceError: not even one sequence fits.
    """
    size = block_bytes(layers, block_size, dtype)
    one = -(-longest // block_size)
    count = min(memory // size, one * max_batch)
    if count < one:
        fits = memory // size * block_size
        raise ResourceError(
            f"--kv-memory of {memory / 2**20:.0f} MiB holds {fits:,} tokens, one request of {option} {longest:,} "
            f"needs {one * size / 2**20:.0f} MiB; give more memory or lower {option}"
        )
    return count
