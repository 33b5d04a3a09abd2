"""The block tables of sequences: allocate, share, copy on write, publish to the prefix cache, evict and release blocks."""

from collections import defaultdict
from collections.abc import Iterable

from quantkit.runtime.core.sequence import Sequence
from quantkit.runtime.kv_cache.block_pool import BlockPool
from quantkit.runtime.kv_cache.eviction import UNBOUNDED, Eviction
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.kv_cache.prefix_cache import ROOT, Entry, PrefixCache


class BlockManager:
    """Owner of all blocks, and of the fields of a sequence that describe its blocks.

    A block is written by one sequence only: shared blocks are full, or are copied before the next token is written.
    A sequence that has evicted blocks publishes no more blocks: what it computes from then on depends on the eviction, not on
    its text alone.

    Attributes:
        block_size: tokens per block.
        pool: the blocks.
        capacity: most tokens that a sequence may hold.
        prefix_cache: which blocks hold known prefixes.
        copies: (source, target) blocks to copy before the next forward.
        evicted: blocks that sequences have evicted so far to stay within their budget.
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
        self.prefix_cache = PrefixCache(offload)
        self.copies: list[tuple[int, int]] = []
        self.evicted = 0
        self._prefix_caching, self._eviction = prefix_caching, eviction
        self.capacity = UNBOUNDED if eviction is None else eviction.blocks * block_size

    def admit(self, sequence: Sequence, budget: int, reserve: int) -> int:
        """Give a sequence without blocks its cached prefix, and blocks for its first new tokens.

        The last token is always computed, because its logits are needed.

        Args:
            sequence: was in no step yet.
            budget: most new tokens.
            reserve: blocks that must remain free.

        Returns:
            The number of tokens after the cached ones that it has room for; 0 if it does not fit.
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
        # The offload could not give back all blocks that it had, and the blocks after those were shared with other sequences.
        assert not whole
        self.release(sequence)
        return 0

    def evict_to_budget(self, sequence: Sequence) -> int:
        """Evict blocks of a sequence that has filled its budget; returns how many tokens it may compute now."""
        if self._eviction is not None and sequence.num_held == self.capacity:
            scores, logical = self._eviction.aged(sequence.scores, sequence.mass), sequence.logical_blocks
            dropped = self._eviction.drop(scores)
            for place in reversed(dropped):
                block = sequence.blocks.pop(place)
                self.pool.release(block, keep=block in self.prefix_cache)
            sequence.evicted = sorted([*sequence.evicted, *(logical[place] for place in dropped)])
            sequence.mass, sequence.scores = [], [score for place, score in enumerate(scores) if place not in dropped]
            sequence.num_evicted += len(dropped) * self.block_size
            self.evicted += len(dropped)
        return self.capacity - sequence.num_held

    def needs_attention_mass(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the attention of the last of the next `num_tokens` tokens decides which blocks are evicted after it."""
        scored = self._eviction is not None and self._eviction.policy.scored
        return scored and sequence.num_held + num_tokens == self.capacity

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` tokens. If there are too few free blocks, change nothing and return False."""
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
        """Mark the next `num_tokens` tokens as computed for good; publish the blocks that they filled."""
        sequence.num_computed += num_tokens
        if not self._prefix_caching or sequence.num_evicted:
            return
        size = self.block_size
        for i in range(sequence.num_published, sequence.num_computed // size):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.chain = self.prefix_cache.publish(sequence.chain, tokens, sequence.blocks[i])
            sequence.num_published += 1

    def trim(self, sequence: Sequence, num_tokens: int = 0) -> None:
        """Release the blocks after the next `num_tokens` tokens: those that were reserved for drafts and are not needed."""
        while len(sequence.blocks) > self._blocks(sequence.num_held + num_tokens):
            self.pool.release(sequence.blocks.pop(), keep=False)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same tokens and no blocks, share all blocks of `parent`."""
        for block in parent.blocks:
            self.pool.share(block)
        child.blocks = parent.blocks[:]
        child.num_computed, child.num_published, child.chain = parent.num_computed, parent.num_published, parent.chain
        child.num_evicted, child.evicted = parent.num_evicted, parent.evicted[:]
        child.scores, child.mass = parent.scores[:], parent.mass[:]

    def release(self, sequence: Sequence) -> None:
        """Release all blocks of a sequence, the last first: the ends of prefixes are reused before their starts."""
        for block in reversed(sequence.blocks):
            self.pool.release(block, keep=block in self.prefix_cache)
        del sequence.blocks[:]
        sequence.num_computed, sequence.num_published, sequence.chain = 0, 0, ROOT
        sequence.num_evicted, sequence.evicted, sequence.scores, sequence.mass = 0, [], [], []

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the pool is consistent, that these sequences hold all used blocks and may share them."""
        self.pool.check()
        self.prefix_cache.check()
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
        """Assert that all holders have a block at the same index after the same text, and that the prefix cache agrees."""
        size = self.block_size
        for sequence, i in holders:
            other, j = holders[0]
            end = min((i + 1) * size, sequence.num_computed, other.num_computed)
            assert i == j, f"block {block} is in two places"
            assert sequence.tokens[:end] == other.tokens[:end], f"block {block} is shared by two texts"
            if block in self.prefix_cache:
                assert i < sequence.num_published, f"block {block} is cached before it is full"
                assert self.prefix_cache.tokens(block) == tuple(sequence.tokens[i * size : (i + 1) * size])

    def _attach(self, sequence: Sequence, nodes: list[Entry]) -> int:
        """Give a sequence its cached prefix, up to the first block that the offload cannot return; returns its tokens."""
        for block, _ in nodes:  # Before any free block is taken, which might be one of these.
            if block is not None:
                self.pool.share(block)
        for i, (block, node) in enumerate(nodes):
            if block is None:
                block = self._take()
                tokens = sequence.tokens[i * self.block_size : (i + 1) * self.block_size]
                if not self.prefix_cache.fetch(sequence.chain, tokens, block):
                    self.pool.release(block, keep=False)
                    for later, _ in nodes[i + 1 :]:
                        if later is not None:
                            self.pool.release(later, keep=True)
                    break
            sequence.blocks.append(block)
            sequence.chain = node
        sequence.num_published, sequence.num_computed = len(sequence.blocks), len(sequence.blocks) * self.block_size
        return sequence.num_computed

    def _match(self, sequence: Sequence) -> list[Entry]:
        """Entries of the longest cached prefix. It leaves out tokens that must be computed, and one block of a budget."""
        nodes: list[Entry] = []
        size, node = self.block_size, ROOT
        for stop in range(size, min(sequence.num_reusable + 1, self.capacity), size):
            entry = self.prefix_cache.find(node, sequence.tokens[stop - size : stop])
            if entry is None:
                break
            node = entry.node
            nodes.append(entry)
        return nodes

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        block = self.pool.take()
        self.prefix_cache.forget(block)
        return block
