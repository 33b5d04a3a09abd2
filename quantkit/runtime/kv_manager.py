"""Block tables of sequences: which blocks they hold, share, copy before writing, publish and give back."""

from collections import defaultdict
from collections.abc import Iterable

from quantkit.runtime.block_pool import BlockPool
from quantkit.runtime.prefix_cache import ROOT, PrefixCache
from quantkit.runtime.sequence import Sequence


class KVManager:
    """Owner of the blocks, and of the fields of a sequence that speak of them.

    A block is written by one sequence only: shared blocks are full, or are copied before the next token is written.

    Attributes:
        block_size: tokens in a block.
        pool: the blocks.
        cache: which of them hold known prefixes.
        copies: (from, to) blocks to copy before the next forward.
    """

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool) -> None:
        self.block_size = block_size
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache()
        self.copies: list[tuple[int, int]] = []
        self._prefix_caching = prefix_caching

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
        num_tokens = min(len(sequence.tokens) - start, budget)
        taken = sum(self.pool.references[block] == 0 for block, _ in nodes)
        if taken + self._blocks(start + num_tokens) - len(nodes) + reserve > self.pool.num_free:
            return 0
        for block, node in nodes:
            self.pool.share(block)
            sequence.blocks.append(block)
            sequence.chain = node
        sequence.num_published, sequence.num_computed = len(nodes), start
        fits = self.extend(sequence, num_tokens)
        assert fits
        return num_tokens

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for the next `num_tokens` tokens; False, and nothing changed, when blocks run out."""
        size, first = self.block_size, sequence.num_computed // self.block_size
        missing = self._blocks(sequence.num_computed + num_tokens) - len(sequence.blocks)
        shared = [i for i in range(first, len(sequence.blocks)) if self.pool.references[sequence.blocks[i]] > 1]
        if missing + len(shared) > self.pool.num_free:
            return False
        for i in shared:
            source, sequence.blocks[i] = sequence.blocks[i], self._take()
            self.pool.release(source, keep=False)
            if i * size < sequence.num_computed:
                self.copies.append((source, sequence.blocks[i]))
        sequence.blocks.extend(self._take() for _ in range(missing))
        return True

    def commit(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that the next `num_tokens` tokens are in the cache for good; publish the blocks that they filled."""
        sequence.num_computed += num_tokens
        if not self._prefix_caching:
            return
        size = self.block_size
        for i in range(sequence.num_published, sequence.num_computed // size):
            tokens = sequence.tokens[i * size : (i + 1) * size]
            sequence.chain = self.cache.publish(sequence.chain, tokens, sequence.blocks[i])
            sequence.num_published += 1

    def trim(self, sequence: Sequence, num_tokens: int = 0) -> None:
        """Give back the blocks behind the next `num_tokens` tokens: what was reserved for drafts and is not needed."""
        while len(sequence.blocks) > self._blocks(sequence.num_computed + num_tokens):
            self.pool.release(sequence.blocks.pop(), keep=False)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child`, which has the same tokens and no blocks, share all of `parent`'s."""
        for block in parent.blocks:
            self.pool.share(block)
        child.blocks = parent.blocks[:]
        child.num_computed, child.num_published, child.chain = parent.num_computed, parent.num_published, parent.chain

    def release(self, sequence: Sequence) -> None:
        """Take all blocks from a sequence. Last ones first, so that the ends of prefixes are evicted before their starts."""
        for block in reversed(sequence.blocks):
            self.pool.release(block, keep=block in self.cache)
        del sequence.blocks[:]
        sequence.num_computed, sequence.num_published, sequence.chain = 0, 0, ROOT

    def check(self, sequences: Iterable[Sequence]) -> None:
        """Assert that the pool adds up, and that every block's holders are these sequences and may share it."""
        self.pool.check()
        self.cache.check()
        holders: dict[int, list[tuple[Sequence, int]]] = defaultdict(list)
        for sequence in sequences:
            assert self._blocks(sequence.num_computed) <= len(sequence.blocks) <= self._blocks(len(sequence.tokens))
            assert sequence.num_published * self.block_size <= sequence.num_computed
            for i, block in enumerate(sequence.blocks):
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

    def _match(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Cached (block, node) of the longest known prefix that leaves at least one token to compute."""
        nodes: list[tuple[int, int]] = []
        size, node = self.block_size, ROOT
        for stop in range(size, len(sequence.tokens), size):
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
