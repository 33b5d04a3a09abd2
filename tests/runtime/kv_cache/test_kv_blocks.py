"""Blocks: reference counts, order of reuse, prefixes, copy on write; and the integrity check finds corrupted state."""

from collections.abc import Callable

import pytest

from helpers.sequences import sequence
from quantkit.runtime.core.sequence import Sequence
from quantkit.runtime.kv_cache.block_manager import BlockManager
from quantkit.runtime.kv_cache.block_pool import BlockPool
from quantkit.runtime.kv_cache.prefix_cache import ROOT, PrefixCache


def computed(kv: BlockManager, tokens: list[int], request_id: int = 0) -> Sequence:
    """A sequence all of whose tokens are in the cache."""
    one = sequence(tokens, request_id=request_id)
    kv.commit(one, kv.admit(one, budget=1000, reserve=0))
    assert one.num_pending == 0
    return one


def test_blocks_are_free_until_held_and_again_when_nobody_holds_them() -> None:
    pool = BlockPool(3)
    first, second = pool.take(), pool.take()
    pool.share(first)
    assert (pool.num_free, pool.references[first], pool.references[second]) == (1, 2, 1)
    pool.release(first, keep=False)
    assert pool.num_free == 1
    pool.release(first, keep=False)
    assert pool.num_free == 2
    pool.check()
    with pytest.raises(AssertionError, match="free already"):
        pool.release(first, keep=False)


def test_unknown_blocks_are_reused_first_and_known_ones_longest_unused_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for block, keep in zip(blocks, (True, True, True, False), strict=True):
        pool.release(block, keep)
    pool.share(blocks[0])
    pool.release(blocks[0], keep=True)
    assert [pool.take() for _ in range(4)] == [blocks[3], blocks[1], blocks[2], blocks[0]]


def test_equal_hashes_do_not_make_equal_prefixes() -> None:
    # Python hashes integers modulo 2**61 - 1.
    twin = 5 + 2**61 - 1
    assert hash((ROOT, (5, 6))) == hash((ROOT, (twin, 6)))
    cache = PrefixCache()
    cache.publish(ROOT, [5, 6], 3)
    assert cache.find(ROOT, [twin, 6]) is None
    assert cache.find(ROOT, [5, 6]) == (3, 1)


def test_a_node_stands_for_everything_before_it() -> None:
    cache = PrefixCache()
    left, right = cache.publish(ROOT, [1, 2], 0), cache.publish(ROOT, [3, 4], 1)
    end = cache.publish(left, [9, 9], 2)
    assert cache.find(left, [9, 9]) == (2, end)
    assert cache.find(right, [9, 9]) is None
    # The block is filled again with the same text: blocks after the old node are not found after the new one.
    cache.forget(0)
    again = cache.publish(ROOT, [1, 2], 0)
    assert again not in (left, right, end)
    assert cache.find(again, [9, 9]) is None
    cache.check()


def test_the_first_of_two_equal_blocks_stays_known() -> None:
    cache = PrefixCache()
    assert cache.publish(ROOT, [1], 0) == cache.publish(ROOT, [1], 1)
    assert 0 in cache
    assert 1 not in cache
    cache.forget(1)
    assert len(cache) == 1


def test_eviction_starts_with_the_ends_of_the_longest_unused_prefix() -> None:
    kv = BlockManager(5, 2, prefix_caching=True)
    old, new = computed(kv, [1, 2, 3, 4, 5, 6], 0), computed(kv, [7, 8, 9, 10], 1)
    kv.release(old)
    kv.release(new)

    def known() -> list[int]:
        """How many blocks of each text are found, without taking any."""
        return [len(kv._match(sequence([*text, 99]))) for text in ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10])]

    seen = []
    for count in range(6):
        seen.append(known())
        if count < 5:
            kv._take()
    assert seen == [[3, 2], [2, 2], [1, 2], [0, 2], [0, 1], [0, 0]]


def test_a_sequence_that_comes_back_starts_a_new_chain() -> None:
    kv = BlockManager(8, 2, prefix_caching=True)
    one = computed(kv, [1, 2, 3, 4, 5])
    # Its blocks are lost while it waits, and computed again.
    kv.release(one)
    for block in [kv._take() for _ in range(8)]:
        kv.pool.release(block, keep=False)
    kv.commit(one, kv.admit(one, budget=1000, reserve=0))
    assert len(kv._match(sequence([1, 2, 3, 4, 9]))) == 2


def test_a_fork_goes_on_with_its_parents_chain() -> None:
    kv = BlockManager(8, 2, prefix_caching=True)
    parent, child = computed(kv, [1, 2]), sequence([1, 2], index=1)
    kv.fork(parent, child)
    child.tokens.extend([3, 4])
    assert kv.extend(child, 2)
    kv.commit(child, 2)
    assert len(kv._match(sequence([1, 2, 3, 4, 9]))) == 2


def test_admission_counts_the_cached_blocks_that_it_takes_out_of_the_free_ones() -> None:
    kv = BlockManager(4, 2, prefix_caching=True)
    kv.release(computed(kv, [1, 2, 3, 4]))
    # Two cached and two new blocks are all four, so none is left in reserve.
    assert kv.admit(sequence([1, 2, 3, 4, 5, 6, 7]), budget=1000, reserve=1) == 0
    assert kv.pool.num_free == 4
    one = sequence([1, 2, 3, 4, 5, 6, 7])
    assert kv.admit(one, budget=1000, reserve=0) == 3
    assert one.num_computed == 4
    # No block is free: even a text that shares held blocks and needs only one more does not fit.
    assert kv.admit(sequence([1, 2, 3, 4, 5], request_id=1), budget=1000, reserve=0) == 0
    kv.check([one])


def test_running_out_changes_nothing() -> None:
    kv = BlockManager(3, 2, prefix_caching=False)
    one = computed(kv, [1, 2, 3, 4])
    before = one.blocks[:]
    assert not kv.extend(one, 3)
    assert one.blocks == before
    assert kv.extend(one, 2)
    kv.release(one)
    assert kv.pool.num_free == 3


def test_forks_copy_only_the_block_that_both_would_write() -> None:
    kv = BlockManager(8, 4, prefix_caching=True)
    parent, child = computed(kv, [1, 2, 3, 4, 5, 6]), sequence([1, 2, 3, 4, 5, 6], index=1)
    kv.fork(parent, child)
    kv.check([parent, child])
    common, partial = parent.blocks
    for one, token in ((parent, 7), (child, 8)):
        one.tokens.append(token)
        assert kv.extend(one, 1)
        kv.commit(one, 1)
        kv.check([parent, child])
    assert kv.copies == [(partial, parent.blocks[1])]
    assert child.blocks[1] == partial
    assert parent.blocks[0] == child.blocks[0] == common
    assert kv.pool.references[common] == 2


def test_forks_of_whole_blocks_copy_nothing() -> None:
    kv = BlockManager(8, 2, prefix_caching=True)
    parent, child = computed(kv, [1, 2, 3, 4]), sequence([1, 2, 3, 4], index=1)
    kv.fork(parent, child)
    for one in (parent, child):
        one.tokens.append(5)
        assert kv.extend(one, 1)
    assert kv.copies == []
    assert parent.blocks[2] != child.blocks[2]


def _leak(kv: BlockManager, one: Sequence, _: Sequence) -> None:
    del one.blocks[-1]


def _extra(kv: BlockManager, one: Sequence, _: Sequence) -> None:
    one.blocks.append(kv.pool.take())


def _steal(kv: BlockManager, one: Sequence, other: Sequence) -> None:
    kv.pool.release(one.blocks[0], keep=False)
    kv.pool.share(other.blocks[0])
    one.blocks[0] = other.blocks[0]


def _twice(kv: BlockManager, one: Sequence, _: Sequence) -> None:
    kv.pool.release(one.blocks[1], keep=False)
    kv.pool.share(one.blocks[0])
    one.blocks[1] = one.blocks[0]


def _lose(kv: BlockManager, _: Sequence, __: Sequence) -> None:
    kv.pool.take()


def _mistake(kv: BlockManager, one: Sequence, _: Sequence) -> None:
    one.tokens[0] = 77


def _early(kv: BlockManager, one: Sequence, _: Sequence) -> None:
    kv.prefix_cache.publish(one.chain, [5, 6], one.blocks[2])


@pytest.mark.parametrize("damage", [_leak, _extra, _steal, _twice, _lose, _mistake, _early])
def test_the_check_sees(damage: Callable[[BlockManager, Sequence, Sequence], None]) -> None:
    kv = BlockManager(10, 2, prefix_caching=True)
    one, other = computed(kv, [1, 2, 3, 4, 5], 0), computed(kv, [6, 7, 8], 1)
    kv.check([one, other])
    damage(kv, one, other)
    with pytest.raises(AssertionError):
        kv.check([one, other])
