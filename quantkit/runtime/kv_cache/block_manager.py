"""Block tables of sequences: which blocks they hold, share, copy before writing, publish, evict and give back."""

from collections import defaultdict
from collections.abc import Iterable

from quantkit.runtime.core.sequence import Sequence
from quantkit.runtime.kv_cache.block_pool import BlockPool
from quantkit.runtime.kv_cache.eviction import UNBOUNDED, Eviction
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.kv_cache.prefix_cache import ROOT, Entry, PrefixCache


class BlockManager:
    """Owner of the blocks, and of the fields of a sequence that speak of them.

    A block is written by one sequence only: shared blocks are full, or are copied before the next token is written.
    A sequence that has dropped blocks publishes no more: what it computes then is not what its text alone would give.

    Attributes:
        block_size: tokens in a block.
        pool: the blocks.
        capacity: tokens that a sequence holds at most.
        cache: which of them hold known prefixes.
        copies: (from, to) blocks to copy before the next forward.
        evicted: blocks that sequences dropped to stay within their budget, since the start.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        prefix_caching: bool,
        eviction: Eviction | None = None,
        offload: KVOffload | None = None,
    ) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(offload)
        self.copies: list[tuple[int, int]] = []
        self.evicted = 0
        self._prefix_caching, self._eviction = prefix_caching, eviction
        self.capacity = UNBOUNDED if eviction is None else eviction.blocks * block_size

    def admit(self, sequence: Sequence, budget: int, reserve: int) -> int:
        """Give a sequence without blocks its cached prefix and room for its first new tokens; 0 when they do not fit.

        The last token is always computed, because its logits are wanted.

        Args:
            sequence: in no step yet.
            budget: new tokens at most.
            reserve: blocks that must be left free.

        Returns:
            How many tokens behind the cached ones it has room for.
        """
        if self.pool.num_free <= reserve:
            return 0
        nodes = self._match(sequence) if self._prefix_caching else []
        start = len(nodes) * self.block_size
        num_tokens = min(len(sequence.tokens) - start, budget, self.capacity - start)
        held = [block for block, _ in nodes if block is not None]
        taken = sum(self.pool.references[block] == 0 for block in held)
        if taken + self._blocks(start + num_tokens) - len(held) + reserve > self.pool.num_free:
            return 0
        whole = self._attach(sequence, nodes) == start
        if not whole:
            start = sequence.num_computed
            num_tokens = min(len(sequence.tokens) - start, budget, self.capacity - start)
        if self.extend(sequence, num_tokens):
            return num_tokens
        # Fewer blocks came back from the store than it had, and those behind them were shared with others.
        assert not whole
        self.release(sequence)
        return 0

    def evict_to_budget(self, sequence: Sequence) -> int:
        """Drop blocks of a sequence that has filled its budget; how many tokens it may compute before it is full again."""
        if self._eviction is not None and sequence.num_held == self.capacity:
            scores, logical = self._eviction.aged(sequence.scores, sequence.mass), sequence.logical_blocks
            dropped = self._eviction.drop(scores)
            for place in reversed(dropped):
                block = sequence.blocks.pop(place)
                self.pool.release(block, keep=block in self.cache)
            sequence.evicted = sorted([*sequence.evicted, *(logical[place] for place in dropped)])
            sequence.mass, sequence.scores = [], [score for place, score in enumerate(scores) if place not in dropped]
            sequence.num_evicted += len(dropped) * self.block_size
            self.evicted += len(dropped)
        return self.capacity - sequence.num_held

    def needs_attention_mass(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the attention of the last of the next `num_tokens` tokens decides what is dropped behind it."""
        scored = self._eviction is not None and self._eviction.policy.scored
        return scored and sequence.num_held + num_tokens == self.capacity

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` tokens; False, and nothing changed, when blocks run out."""
        size, first = self.block_size, sequence.num_held // self.block_size
        missing = self._blocks(sequence.num_held + num_tokens) - len(sequence.blocks)
        shared = [i for i in range(first, len(sequence.blocks)) if self.pool.references[sequence.blocks[i]] > 1]
        if missing + len(shared) > self.pool.num_free:
            return False
        for i in shared:
            source, sequence.blocks[i] = sequence.blocks[i], self._take()
            self.pool.release(source, keep=False)
            if i * size < sequence.num_held:
                self.copies.append((source, sequence.blocks[i]))
        sequence.blocks.extend(self._take() for _ in range(missing))
        return True

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that the next `num_tokens` tokens are in the cache for good; publish the blocks that they filled."""
        sequence.num_computed += num_tokens
        if not self._prefix_caching or sequence.num_evicted:
            return
        size = self.block_size
        for i in range(sequence.num_published, sequence.num_computed // size):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.chain = self.cache.publish(sequence.chain, tokens, sequence.blocks[i])
            sequence.num_published += 1

    def trim(self, sequence: Sequence, num_tokens: int = 0) -> None:
        """Give back the blocks behind the next `num_tokens` tokens: what was reserved for drafts and is not needed."""
        while len(sequence.blocks) > self._blocks(sequence.num_held + num_tokens):
            self.pool.release(sequence.blocks.pop(), keep=False)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same tokens and no blocks, share all of `parent`'s."""
        for block in parent.blocks:
            self.pool.share(block)
        child.blocks = parent.blocks[:]
        child.num_computed, child.num_published, child.chain = parent.num_computed, parent.num_published, parent.chain
        child.num_evicted, child.evicted = parent.num_evicted, parent.evicted[:]
        child.scores, child.mass = parent.scores[:], parent.mass[:]

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence. Last ones first, so that the ends of prefixes are evicted before their starts."""
        for block in reversed(sequence.blocks):
            self.pool.release(block, keep=block in self.cache)
        del sequence.blocks[:]
        sequence.num_computed, sequence.num_published, sequence.chain = 0, 0, ROOT
        sequence.num_evicted, sequence.evicted, sequence.scores, sequence.mass = 0, [], [], []

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the pool adds up, and that every block's holders are these sequences and may share it."""
        self.pool.check()
        self.cache.check()
        holders: dict[int, list[tuple[Sequence, int]]] = defaultdict(list)
        for sequence in sequences:
            evicted, held = sequence.num_evicted, len(sequence.blocks)
            assert evicted == len(sequence.evicted) * self.block_size
            assert self._blocks(sequence.num_held) <= held <= self._blocks(len(sequence.tokens) - evicted)
            assert held * self.block_size <= self.capacity, "a sequence is over its budget"
            assert sequence.num_published * self.block_size <= sequence.num_computed
            for i, block in zip(sequence.logical_blocks, sequence.blocks, strict=True):
                holders[block].append((sequence, i))
        for block, count in enumerate(self.pool.references):
            assert len(holders[block]) == count, f"block {block} has {len(holders[block])} holders and counts {count}"
            self._check_holders(block, holders[block])

    def _check_holders(self, block: int, holders: list[tuple[Sequence, int]]) -> None:
        """All hold it in the same place, behind the same text; and the prefix cache knows it by that text."""
        size = self.block_size
        for sequence, i in holders:
            other, j = holders[0]
            end = min((i + 1) * size, sequence.num_computed, other.num_computed)
            assert i == j, f"block {block} is in two places"
            assert sequence.tokens[:end] == other.tokens[:end], f"block {block} is shared by two texts"
            if block in self.cache:
                assert i < sequence.num_published, f"block {block} is cached before it is full"
                assert self.cache.tokens(block) == tuple(sequence.tokens[i * size : (i + 1) * size])

    def _attach(self, sequence: Sequence, nodes: list[Entry]) -> int:
        """Give a sequence its cached prefix, up to a block that the store does not give back; how many tokens that are."""
        for block, _ in nodes:  # before any other is taken
            if block is not None:
                self.pool.share(block)
        for i, (block, node) in enumerate(nodes):
            if block is None:
                block = self._take()
                tokens = sequence.tokens[i * self.block_size : (i + 1) * self.block_size]
                if not self.cache.fetch(sequence.chain, tokens, block):
                    self.pool.release(block, keep=False)
                    for behind, _ in nodes[i + 1 :]:
                        if behind is not None:
                            self.pool.release(behind, keep=True)
                    break
            sequence.blocks.append(block)
            sequence.chain = node
        sequence.num_published, sequence.num_computed = len(sequence.blocks), len(sequence.blocks) * self.block_size
        return sequence.num_computed

    def _match(self, sequence: Sequence) -> list[Entry]:
        """Cached entries of the longest known prefix that leaves the tokens that must be computed, and a block of a budget."""
        nodes: list[Entry] = []
        size, node = self.block_size, ROOT
        for stop in range(size, min(sequence.num_reusable + 1, self.capacity), size):
            entry = self.cache.find(node, sequence.tokens[stop - size : stop])
            if entry is None:
                break
            node = entry.node
            nodes.append(entry)
        return nodes

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        block = self.pool.take()
        self.cache.forget(block)
        return block
