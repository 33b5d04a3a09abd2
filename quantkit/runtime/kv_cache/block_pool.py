"""The pool of physical KV blocks: a reference count per block, and the order in which free blocks are reused.

A block is free when nobody holds it. A free block may still be known to the prefix cache; such blocks are reused last, in LRU
order.
"""

from collections import OrderedDict


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts.

    Attributes:
        references: number of holders of each block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        # A linked list: removing from the front and from the middle take constant time.
        self._free = OrderedDict[int, None].fromkeys(range(num_blocks))

    def __len__(self) -> int:
        return len(self.references)

    @property
    def num_free(self) -> int:
        """Number of blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Take the next free block, with one holder. There must be one."""
        block, _ = self._free.popitem(last=False)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a holder to a block, free or not."""
        if self.references[block] == 0:
            del self._free[block]
        self.references[block] += 1

    def release(self, block: int, keep: bool) -> None:
        """Remove a holder from a block. If that frees it, it is reused last with `keep`, and first without."""
        assert self.references[block] > 0, f"block {block} is free already"
        self.references[block] -= 1
        if self.references[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=keep)

    def check(self) -> None:
        """Assert that every block is either free or held."""
        unheld = [block for block, count in enumerate(self.references) if count == 0]
        assert sorted(self._free) == unheld, "the free blocks are not those that nobody holds"
        assert min(self.references, default=0) >= 0
