"""Known prefixes that had to leave the device: kept in host memory first, then in a file, and dropped in LRU order.

Blocks are found as in the prefix cache, by the node before them and by their own tokens. They keep their node, so the blocks
after them can still be found. A block that cannot be read back intact counts as never stored: its tokens are computed again.

Nothing here waits for the disk. Blocks that wait to be written are copied to a share of the host memory that is reserved for
them. When that is full, because the disk is too slow, further blocks are dropped.
"""

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from quantkit.errors import ResourceError
from quantkit.runtime.kv_cache.disk_tier import DiskTier
from quantkit.runtime.kv_cache.host_tier import Blocks, HostTier
from quantkit.runtime.kv_cache.options import OffloadOptions

#: Key of a block: the node before it, and its tokens.
Key = tuple[int, tuple[int, ...]]

#: One in this many blocks of host memory is reserved for blocks that wait to be written.
_WAITING_SHARE = 8


class OffloadStats(NamedTuple):
    """Counts since the start.

    Attributes:
        saved: blocks that left the device and were stored.
        fetched: blocks that were copied back.
        lost: blocks that the disk did not take, not in time, or returned damaged.
    """

    saved: int
    fetched: int
    lost: int


@dataclass(frozen=True)
class _Stored:
    node: int
    place: int


class _Index:
    """The blocks of one tier by key, in LRU order, and its free places."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.held: OrderedDict[Key, _Stored] = OrderedDict()
        self._given_back: list[int] = []

    def free_place(self) -> int | None:
        """A place that holds no block; None if there is none."""
        if self._given_back:
            return self._given_back.pop()
        # All places below this one are in use.
        return len(self.held) if len(self.held) < self.places else None

    def remove(self, key: Key) -> None:
        """Forget a block."""
        self._given_back.append(self.held.pop(key).place)

    def check(self) -> None:
        """Assert that each place either holds one block or is free."""
        places = [*(stored.place for stored in self.held.values()), *self._given_back]
        assert sorted(places) == list(range(len(places)))
        assert len(places) <= self.places


class KVOffload:
    """Stores blocks on the host and on disk, and finds them by the text that they hold.

    Attributes:
        disk: takes blocks that host memory has no room for; None without a folder.
    """

    def __init__(self, blocks: Blocks, options: OffloadOptions, other_bytes: int = 0) -> None:
        """
        Args:
            blocks: the blocks on the device.
            options: where they go.
            other_bytes: bytes on the device that are allocated for other caches.

        Raises:
            ResourceError: the memory does not hold even one block, or the file cannot be created.
        """
        places, waiting = options.memory // blocks.block_bytes, 0
        if options.folder is not None:
            waiting = max(1, places // _WAITING_SHARE)
        if places <= waiting:
            least = f"{'two blocks' if waiting else 'a block'} of {blocks.block_bytes / 2**20:.2f} MiB"
            raise ResourceError(f"--kv-offload of {options.memory:,} bytes does not hold {least}; give more")
        self._host = HostTier(blocks, places - waiting, other_bytes)
        self.disk = None if options.folder is None else DiskTier(options.folder, blocks.block_bytes, waiting)
        self._host_index, self._disk_index = _Index(places - waiting), _Index(0 if self.disk is None else self.disk.places)
        self._saved = self._fetched = self._dropped = 0
        if self.disk is not None:
            weakref.finalize(self, self.disk.close)

    def __len__(self) -> int:
        return len(self._host_index.held) + len(self._disk_index.held)

    def find(self, key: Key) -> int | None:
        """The node at the end of a stored block, which becomes the most recently used; None if it is not stored."""
        on_disk = self._disk_index.held.get(key)
        if on_disk is not None and self.disk is not None and not self.disk.holds(on_disk.place):
            self._disk_index.remove(key)  # The disk did not take it.
        for tier in (self._host_index, self._disk_index):
            if key in tier.held:
                tier.held.move_to_end(key)
                return tier.held[key].node
        return None

    @property
    def stats(self) -> OffloadStats:
        """Counts so far."""
        lost = self._dropped + (0 if self.disk is None else self.disk.lost)
        return OffloadStats(self._saved, self._fetched, lost)

    def save(self, key: Key, node: int, block: int) -> None:
        """Store a block of the device that is about to be reused."""
        if self.find(key) is not None:
            return
        place = self._host_index.free_place()
        if place is None:
            self._spill()
            place = self._host_index.free_place()
        assert place is not None
        self._host.put(place, block)
        self._host_index.held[key] = _Stored(node, place)
        self._saved += 1

    def load(self, key: Key, block: int) -> bool:
        """Copy a stored block to the device. If it is not stored, or damaged, return False; it is then not found again."""
        if key in self._host_index.held:
            self._host.get(self._host_index.held[key].place, block)
        elif key in self._disk_index.held:
            assert self.disk is not None
            data = self.disk.read(self._disk_index.held[key].place)
            if data is None:
                self._disk_index.remove(key)
                return False
            self._host.send(data, block)
        else:
            return False
        self._fetched += 1
        return True

    def check(self) -> None:
        """Assert that both tiers are consistent, and that no block is in both."""
        self._host_index.check()
        self._disk_index.check()
        assert not self._host_index.held.keys() & self._disk_index.held.keys()

    def nodes(self) -> dict[Key, int]:
        """Key -> node of every stored block."""
        return {key: stored.node for tier in (self._host_index, self._disk_index) for key, stored in tier.held.items()}

    def _spill(self) -> None:
        """Move the least recently used block out of host memory: to disk, if there is one that keeps up."""
        key, stored = next(iter(self._host_index.held.items()))
        if self.disk is not None and self._disk_index.places:
            if self.disk.busy:
                self._dropped += 1
            else:
                self._file_away(self.disk, key, stored)
        self._host_index.remove(key)

    def _file_away(self, file: DiskTier, key: Key, stored: _Stored) -> None:
        """Have a block of host memory written to disk, in place of the disk's least recently used block if it is full."""
        place = self._disk_index.free_place()
        if place is None:
            self._disk_index.remove(next(iter(self._disk_index.held)))
            place = self._disk_index.free_place()
        assert place is not None
        file.write(place, self._host.read(stored.place).clone())
        self._disk_index.held[key] = _Stored(stored.node, place)
