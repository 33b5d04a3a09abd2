"""Prompt lookup, compared with its definition."""

from array import array
from random import Random

import pytest

from helpers.sequences import sequence
from quantkit.runtime.speculative.ngram import LONGEST, SHORTEST, Index, NgramProposer


def looked_up(tokens: list[int], count: int) -> list[int]:
    """The definition: the latest earlier occurrence of the longest suffix, and the text after it, repeated if it is short."""
    end = len(tokens)
    for n in range(LONGEST, SHORTEST - 1, -1):
        for stop in range(end - 1, n - 1, -1):
            if end > n and tokens[stop - n : stop] == tokens[end - n :]:
                text = tokens[stop:]
                while len(text) < count:
                    text += tokens[stop:]
                return text[:count]
    return []


@pytest.mark.parametrize("vocab", [2, 3, 8])
def test_growing_texts(vocab: int) -> None:
    draw = Random(vocab)
    for _ in range(30):
        index, tokens, hits = Index(), array("q"), 0
        while len(tokens) < 80:
            tokens.extend(draw.randrange(vocab) for _ in range(draw.randint(1, 5)))
            count = draw.randint(1, 9)
            found = index.follow(tokens, count)
            assert found == looked_up(tokens.tolist(), count)
            hits += bool(found)
        assert hits > 0


def test_a_period_goes_on() -> None:
    assert Index().follow(array("q", [9, 1, 2, 3, 1, 2, 3]), 7) == [1, 2, 3, 1, 2, 3, 1]
    assert Index().follow(array("q", [5, 5, 5]), 4) == [5] * 4


def test_longer_matches_come_before_later_ones() -> None:
    #         1 2 3 4 -> 7, later 3 4 -> 8
    tokens = array("q", [1, 2, 3, 4, 7, 0, 3, 4, 8, 0, 1, 2, 3, 4])
    assert Index().follow(tokens, 1) == [7]


def test_short_and_new_texts_have_no_draft() -> None:
    for tokens in ([], [1], [1, 1], [1, 2, 3, 4, 5]):
        assert Index().follow(array("q", tokens), 3) == []


def test_sequences_are_kept_apart_and_forgotten() -> None:
    proposer = NgramProposer()
    first, second = sequence([1, 2, 7, 1, 2]), sequence([1, 2, 8, 1, 2])
    assert [list(draft.tokens) for draft in proposer.propose([(first, 1), (second, 2)])] == [[7], [8, 1]]
    proposer.released(first)
    proposer.released(first)
    del first.tokens[:]
    first.tokens.extend([3, 3, 3])
    assert [list(draft.tokens) for draft in proposer.propose([(first, 1)])] == [[3]]
