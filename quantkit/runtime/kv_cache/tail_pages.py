"""Which block has which 16-bit tail page while it may still change (see `kernels.layouts.quantized_kv`).

A page is taken when a step writes to a block. It is given back when a later step of the sequence, which is not a draft, begins
after the block: the tokens in the block are then accepted for good. The cache is not told when a sequence ends; its pages are
reclaimed in LRU order. Every running sequence touches its pages in every step, except for one that has to sit out because
blocks are short. So the pages touched last are those of all live sequences, and there are enough of them:

    2 per sequence (a draft may begin another page), and as many as the longest prompt chunk fills.

A page that was reclaimed too early would be noticed: a step that continues inside a block asserts that the block has its page.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from quantkit.runtime.core.batch import KVSpan


def tail_pages_needed(block_size: int, max_batch: int, step_tokens: int) -> int:
    """Tail pages for `max_batch` running sequences and `step_tokens` new tokens per step."""
    return 2 * (max_batch + 1) + -(-step_tokens // block_size)


class TailPages:
    """The assignment of tail pages to blocks.

    Attributes:
        table: int32 [num_blocks], the page of each block, for kernels; arbitrary where a block has none.
    """

    def __init__(self, num_blocks: int, block_size: int, count: int, device: torch.device) -> None:
        """
        Args:
            num_blocks, block_size, device: of the cache.
            count: pages.
        """
        self.table = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        self._block_size, self._free = block_size, list(range(count))
        #: Block -> page, the least recently touched first.
        self._pages: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        """Pages in use."""
        return len(self._pages)

    def prepare(self, held: Iterable[KVSpan], draft: bool) -> None:
        """Give a page to every block that a step writes to. A step that is not a `draft` makes all earlier tokens final."""
        size = self._block_size
        writes: list[int] = []
        for blocks, before, after in held:
            first = final = before // size
            while final and not draft and blocks[final - 1] in self._pages:
                final -= 1
                self._free.append(self._pages.pop(blocks[final]))
            assert before % size == 0 or blocks[first] in self._pages, f"the tail page of block {blocks[first]} is lost"
            writes.extend(blocks[first : (after - 1) // size + 1])
        self._take(writes)

    def copy(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The (source, target) pages that must be copied together with (source, target) blocks."""
        copies = []
        for source, target in pairs:
            if source in self._pages:
                self._take((source, target))
                copies.append((self._pages[source], self._pages[target]))
            elif target in self._pages:  # The page belonged to a sequence that has ended.
                self._free.append(self._pages.pop(target))
        return copies

    def _take(self, blocks: Sequence[int]) -> None:
        """Make sure that blocks have pages, and touch these in the given order."""
        missing = [block for block in blocks if block not in self._pages]
        for block in blocks:
            if block in self._pages:
                self._pages.move_to_end(block)
        for block in missing:
            if not self._free:
                oldest, page = self._pages.popitem(last=False)
                assert oldest not in blocks, "a step writes to more tail pages than there are"
                self._free.append(page)
            self._pages[block] = self._free.pop()
        if missing:
            where = torch.tensor(missing, device=self.table.device)
            pages = [self._pages[block] for block in missing]
            self.table[where] = torch.tensor(pages, dtype=torch.int32, device=self.table.device)
