"""Which blocks hold the keys and values of which prefixes.

A hash chain: a full block is known by the node of the block before it and by its own tokens, so a node stands for the whole
text from the start. The dict compares keys after hashing them, and a node's number is never used again: no collision, and
no block that was evicted and filled anew, can pass for another text.
"""

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

#: The node before the first block.
ROOT = 0


class Entry(NamedTuple):
    """A cached block and the node at its end."""

    block: int
    node: int


class PrefixCache:
    """Full blocks by what they hold."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, tuple[int, ...]], Entry] = {}
        self._keys: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._numbers = count(ROOT + 1)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, parent: int, tokens: Sequence[int]) -> Entry | None:
        """The block that holds `tokens` behind node `parent`."""
        return self._entries.get((parent, tuple(tokens)))

    def publish(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Make a full block known; returns the node at its end. Of two blocks with the same text the first one stays known."""
        key = parent, tuple(tokens)
        known = self._entries.get(key)
        if known is not None:
            return known.node
        self._entries[key] = Entry(block, next(self._numbers))
        self._keys[block] = key
        return self._entries[key].node

    def forget(self, block: int) -> None:
        """Drop a block, known or not, because it is about to hold something else."""
        key = self._keys.pop(block, None)
        if key is not None:
            del self._entries[key]

    def tokens(self, block: int) -> tuple[int, ...]:
        """What a known block holds."""
        return self._keys[block][1]

    def check(self) -> None:
        """Assert that both directions agree."""
        assert {entry.block: key for key, entry in self._entries.items()} == self._keys
