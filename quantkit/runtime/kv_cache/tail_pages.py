"""Which block has which 16-bit page while it may still change (see `kernels.kv_store`).

A page is taken when a step writes to a block, and given back when a step of its sequence that is no draft begins behind it:
the tokens in it are then accepted for good. Nobody says that a sequence has ended, so the pages that ended sequences leave
are taken from whoever has not touched theirs for longest. All running sequences touch theirs in every step, but for one that
sits out while blocks are short; so the ones touched last are all that are alive, and there are enough of them:

    2 a sequence (a draft may begin another page), and what the longest prompt chunk fills.

A lost page would be noticed: a step that goes on inside a block asserts that it has its page.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch

from quantkit.runtime.core.batch import KVSpan


def pages_needed(block_size: int, max_batch: int, step_tokens: int) -> int:
    """Open pages for so many running sequences and new tokens a step."""
    return 2 * (max_batch + 1) + -(-step_tokens // block_size)


class TailPages:
    """The assignment of pages to blocks.

    Attributes:
        table: int32 [num_blocks], for kernels; arbitrary where a block has no page.
    """

    def __init__(self, num_blocks: int, block_size: int, count: int, device: torch.device) -> None:
        self.table = torch.zeros(num_blocks, dtype=torch.int32, device=device)
        self._block_size, self._free = block_size, list(range(count))
        #: Block -> page, the one touched longest ago first.
        self._pages: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        """Pages in use."""
        return len(self._pages)

    def prepare(self, held: Iterable[KVSpan], draft: bool) -> None:
        """Give every block that a step writes its page. A `draft` makes no earlier token final."""
        size = self._block_size
        writes: list[int] = []
        for blocks, before, after in held:
            first = final = before // size
            while final and not draft and blocks[final - 1] in self._pages:
                final -= 1
                self._free.append(self._pages.pop(blocks[final]))
            assert before % size == 0 or blocks[first] in self._pages, f"the open page of block {blocks[first]} is lost"
            writes.extend(blocks[first : (after - 1) // size + 1])
        self._take(writes)

    def copy(self, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """(from, to) pages that have to be copied with (from, to) blocks."""
        copies = []
        for source, target in pairs:
            if source in self._pages:
                self._take((source, target))
                copies.append((self._pages[source], self._pages[target]))
            elif target in self._pages:  # Somebody else's, who has ended.
                self._free.append(self._pages.pop(target))
        return copies

    def _take(self, blocks: Sequence[int]) -> None:
        """See that blocks have pages, and touch them in this order."""
        missing = [block for block in blocks if block not in self._pages]
        for block in blocks:
            if block in self._pages:
                self._pages.move_to_end(block)
        for block in missing:
            if not self._free:
                oldest, page = self._pages.popitem(last=False)
                assert oldest not in blocks, "a step writes more pages than there are"
                self._free.append(page)
            self._pages[block] = self._free.pop()
        if missing:
            where = torch.tensor(missing, device=self.table.device)
            pages = [self._pages[block] for block in missing]
            self.table[where] = torch.tensor(pages, dtype=torch.int32, device=self.table.device)
