"""Physical KV blocks: who holds each, and which are free in which order.

A block is free when nobody holds it. A free block may still be known to the prefix cache: these are given out last, the
longest unused first.
"""

from collections import OrderedDict


class BlockPool:
    """Blocks 0 .. num_blocks - 1 with reference counts.

    Attributes:
        references: holders of each block.
    """

    def __init__(self, num_blocks: int) -> None:
        self.references = [0] * num_blocks
        # A linked list, so that taking from the front and out of the middle cost the same at any size.
        self._free = OrderedDict[int, None].fromkeys(range(num_blocks))

    def __len__(self) -> int:
        return len(self.references)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """The next free block, held once. There must be one."""
        block, _ = self._free.popitem(last=False)
        self.references[block] = 1
        return block

    def share(self, block: int) -> None:
        """Hold a block once more, free or not."""
        if self.references[block] == 0:
            del self._free[block]
        self.references[block] += 1

    def release(self, block: int, keep: bool) -> None:
        """Hold a block once less. When that frees it, `keep` puts it last in the order, otherwise it is first."""
        assert self.references[block] > 0, f"block {block} is free already"
        self.references[block] -= 1
        if self.references[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=keep)

    def check(self) -> None:
        """Assert that every block is either free or held: free + used = total."""
        unheld = [block for block, count in enumerate(self.references) if count == 0]
        assert sorted(self._free) == unheld, "the free blocks are not those that nobody holds"
        assert min(self.references, default=0) >= 0
