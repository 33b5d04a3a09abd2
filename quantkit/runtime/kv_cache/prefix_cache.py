"""Which blocks hold the keys and values of which prefixes.

A hash chain: a full block is known by the node of the block before it and by its own tokens, so a node stands for the whole
text from the start. The dict compares keys after hashing them, and a node's number is never used again: no collision, and
no block that was evicted and filled anew, can pass for another text.

With a store, a block that is about to hold something else is saved there, and its node lives on.
"""

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from quantkit.runtime.kv_cache.offload import Key, KVOffload

#: The node before the first block.
ROOT = 0


class Entry(NamedTuple):
    """A cached block, or None where only the store has it, and the node at its end."""

    block: int | None
    node: int


class PrefixCache:
    """Full blocks by what they hold."""

    def __init__(self, offload: KVOffload | None = None) -> None:
        """
        Args:
            offload: of blocks that leave the device; without it they are gone.
        """
        self._offload = offload
        self._entries: dict[Key, Entry] = {}
        self._keys: dict[int, Key] = {}
        self._numbers = count(ROOT + 1)

    def __contains__(self, block: int) -> bool:
        return block in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, parent: int, tokens: Sequence[int]) -> Entry | None:
        """The block that holds `tokens` behind node `parent`."""
        key = parent, tuple(tokens)
        entry = self._entries.get(key)
        if entry is not None or self._offload is None:
            return entry
        node = self._offload.find(key)
        return None if node is None else Entry(None, node)

    def publish(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Make a full block known; returns the node at its end. Of two blocks with the same text the first one stays known."""
        key = parent, tuple(tokens)
        known = self.find(parent, tokens)
        if known is None:
            known = Entry(None, next(self._numbers))
        if known.block is None:
            self._know(key, known.node, block)
        return known.node

    def fetch(self, parent: int, tokens: Sequence[int], block: int) -> bool:
        """Bring what the store has behind node `parent` into a block, and make it known; False where that fails."""
        key = parent, tuple(tokens)
        assert self._offload is not None
        node = self._offload.find(key)
        if node is None or not self._offload.load(key, block):
            return False
        self._know(key, node, block)
        return True

    def forget(self, block: int) -> None:
        """Drop a block, known or not, because it is about to hold something else; the store keeps what it held."""
        key = self._keys.pop(block, None)
        if key is not None:
            node = self._entries.pop(key).node
            if self._offload is not None:
                self._offload.save(key, node, block)

    def tokens(self, block: int) -> tuple[int, ...]:
        """What a known block holds."""
        return self._keys[block][1]

    def check(self) -> None:
        """Assert that both directions agree."""
        assert {entry.block: key for key, entry in self._entries.items()} == self._keys
        if self._offload is not None:
            self._offload.check()
            shared = self._offload.nodes().items() & {key: entry.node for key, entry in self._entries.items()}.items()
            assert len(shared) == len(self._offload.nodes().keys() & self._entries.keys()), "a text has two nodes"

    def _know(self, key: Key, node: int, block: int) -> None:
        self._entries[key] = Entry(block, node)
        self._keys[block] = key
