"""Tail pages of int4 caches: which blocks have one, until when; and losing one is noticed."""

import pytest
import torch

from quantkit.runtime.core.batch import KVSpan
from quantkit.runtime.kv_cache.tail_pages import TailPages, tail_pages_needed

SIZE = 4


def _pages(tail_pages: TailPages, blocks: list[int]) -> list[int]:
    return tail_pages.table[blocks].tolist()


def test_every_block_that_a_step_writes_has_a_page_of_its_own() -> None:
    pages = TailPages(10, SIZE, 8, torch.device("cpu"))
    pages.prepare([KVSpan([7, 2, 5], 0, 10), KVSpan([1], 0, 3)], draft=False)
    assert len(pages) == 4
    found = _pages(pages, [7, 2, 5, 1])
    assert len(set(found)) == 4
    pages.prepare([KVSpan([7, 2, 5], 10, 11), KVSpan([1], 3, 4)], draft=False)
    assert _pages(pages, [5, 1]) == found[2:]


def test_a_page_is_given_back_when_a_step_begins_behind_it() -> None:
    pages = TailPages(10, SIZE, 8, torch.device("cpu"))
    pages.prepare([KVSpan([7, 2, 5], 0, 10)], draft=False)
    pages.prepare([KVSpan([7, 2, 5], 10, 11)], draft=False)
    assert len(pages) == 1


def test_a_draft_gives_nothing_back() -> None:
    """The page stays, so that a later step may begin before the draft."""
    pages = TailPages(10, SIZE, 8, torch.device("cpu"))
    pages.prepare([KVSpan([7, 2], 0, 7)], draft=False)
    before = _pages(pages, [2])
    for length in (7, 8, 9):
        pages.prepare([KVSpan([7, 2, 5], length, length + 1)], draft=True)
    pages.prepare([KVSpan([7, 2, 5], 7, 10)], draft=False)
    assert _pages(pages, [2]) == before
    assert len(pages) == 2  # The pages of the block that holds token 7, and of the next block.


def test_pages_that_nobody_uses_are_taken_from_whoever_used_theirs_longest_ago() -> None:
    pages = TailPages(10, SIZE, 3, torch.device("cpu"))
    for block in range(3):
        pages.prepare([KVSpan([block], 0, 2)], draft=False)
    pages.prepare([KVSpan([0], 2, 3)], draft=False)
    kept = _pages(pages, [0, 2])
    pages.prepare([KVSpan([3], 0, 1)], draft=False)
    assert _pages(pages, [0, 2]) == kept
    with pytest.raises(AssertionError, match="the tail page of block 1 is lost"):
        pages.prepare([KVSpan([1], 2, 3)], draft=False)


def test_more_pages_than_there_are() -> None:
    pages = TailPages(10, SIZE, 3, torch.device("cpu"))
    with pytest.raises(AssertionError, match="a step writes to more tail pages than there are"):
        pages.prepare([KVSpan([7, 2, 5, 4], 0, 13)], draft=False)


def test_a_copied_block_gets_a_copy_of_its_page() -> None:
    pages = TailPages(10, SIZE, 4, torch.device("cpu"))
    pages.prepare([KVSpan([7], 0, 2), KVSpan([3], 0, 1)], draft=False)
    copies = pages.copy([(7, 5), (6, 3), (7, 4)])
    assert copies == [(page := _pages(pages, [7])[0], _pages(pages, [5])[0]), (page, _pages(pages, [4])[0])]
    assert len({*_pages(pages, [7, 5, 4])}) == 3
    # Block 3 is now a copy of a full block without a page, so the page that block 3 had is no longer its content.
    with pytest.raises(AssertionError, match="the tail page of block 3 is lost"):
        pages.prepare([KVSpan([3], 1, 2)], draft=False)


def test_enough_for_every_sequence_and_the_longest_chunk() -> None:
    assert tail_pages_needed(block_size=32, max_batch=4, step_tokens=70) == 2 * 5 + 3
