"""Which blocks hold the keys and values of which prefixes.

A hash chain: the key of a full block is the node of the block before it, and its own tokens. A node therefore stands for the
whole text from the start. The dict compares keys after hashing them, and node numbers are never reused. So neither a hash
collision nor a block that was reused for another text can be taken for a wrong prefix.

With an offload, a block that is about to be reused is saved there, and keeps its node.
"""

from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

from quantkit.runtime.kv_cache.offload import Key, KVOffload

#: The node before the first block of every text.
ROOT = 0


class Entry(NamedTuple):
    """A cached block, or None if only the offload has it; and the node at its end."""

    block: int | None
    node: int


class PrefixCache:
    """Finds full blocks by the text that they hold."""

    def __init__(self, offload: KVOffload | None = None) -> None:
        """
        Args:
            offload: keeps blocks that leave the device; without it they are lost.
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
        """The block that holds `tokens` after the node `parent`; None if it is not known."""
        key = parent, tuple(tokens)
        entry = self._entries.get(key)
        if entry is not None or self._offload is None:
            return entry
        node = self._offload.find(key)
        return None if node is None else Entry(None, node)

    def publish(self, parent: int, tokens: Sequence[int], block: int) -> int:
        """Make a full block known; returns the node at its end. Of two blocks with the same text, the first stays known."""
        key = parent, tuple(tokens)
        known = self.find(parent, tokens)
        if known is None:
            known = Entry(None, next(self._numbers))
        if known.block is None:
            self._know(key, known.node, block)
        return known.node

    def fetch(self, parent: int, tokens: Sequence[int], block: int) -> bool:
        """Load the offloaded block that holds `tokens` after the node `parent` into `block`; False if that fails."""
        key = parent, tuple(tokens)
        assert self._offload is not None
        node = self._offload.find(key)
        if node is None or not self._offload.load(key, block):
            return False
        self._know(key, node, block)
        return True

    def forget(self, block: int) -> None:
        """Forget a block, known or not, because it is about to be reused; the offload saves its contents."""
        key = self._keys.pop(block, None)
        if key is not None:
            node = self._entries.pop(key).node
            if self._offload is not None:
                self._offload.save(key, node, block)

    def tokens(self, block: int) -> tuple[int, ...]:
        """The tokens of a known block."""
        return self._keys[block][1]

    def check(self) -> None:
        """Assert that both dictionaries agree with each other and with the offload."""
        assert {entry.block: key for key, entry in self._entries.items()} == self._keys
        if self._offload is not None:
            self._offload.check()
            shared = self._offload.nodes().items() & {key: entry.node for key, entry in self._entries.items()}.items()
            assert len(shared) == len(self._offload.nodes().keys() & self._entries.keys()), "a text has two nodes"

    def _know(self, key: Key, node: int, block: int) -> None:
        self._entries[key] = Entry(block, node)
        self._keys[block] = key
