"""Known prefixes that had to leave the device: kept in host memory, then in a file, the longest unused first to go.

Blocks are found as in the prefix cache, by the node before them and by their own tokens, and keep the number of their node,
so that what was known behind them still is. A block that cannot be had back intact is one that was never stored: its tokens
are computed anew.

Nothing here waits for the disk. Blocks on their way to the file are copies in a share of the memory that is kept for them;
when that is full, because the disk is too slow, those that would follow are dropped.
"""

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from quantkit.errors import ResourceError
from quantkit.runtime.kv_cache.disk_tier import DiskTier
from quantkit.runtime.kv_cache.host_tier import Blocks, HostTier
from quantkit.runtime.kv_cache.options import OffloadOptions

#: The node before a block, and the block's tokens.
Key = tuple[int, tuple[int, ...]]

#: One block in so many that the memory holds is kept for those on their way to the file.
_WAITING_SHARE = 8


class OffloadStats(NamedTuple):
    """Blocks saved and fetched back since the start; lost ones the file did not take, or not in time, or gave back damaged."""

    saved: int
    fetched: int
    lost: int


@dataclass(frozen=True)
class _Stored:
    node: int
    place: int


class _Index:
    """Stored blocks by key, the longest unused first, and the places that are free."""

    def __init__(self, places: int) -> None:
        self.places = places
        self.held: OrderedDict[Key, _Stored] = OrderedDict()
        self._given_back: list[int] = []

    def free_place(self) -> int | None:
        """One that holds nothing; None when all do."""
        if self._given_back:
            return self._given_back.pop()
        # All places below were given out, and none of them came back.
        return len(self.held) if len(self.held) < self.places else None

    def remove(self, key: Key) -> None:
        """Forget a block."""
        self._given_back.append(self.held.pop(key).place)

    def check(self) -> None:
        """Assert that each place is held by one block or free."""
        places = [*(stored.place for stored in self.held.values()), *self._given_back]
        assert sorted(places) == list(range(len(places)))
        assert len(places) <= self.places


class KVOffload:
    """Blocks by what they hold.

    Attributes:
        disk: takes blocks that host memory has no room for; None without a folder.
    """

    def __init__(self, blocks: Blocks, options: OffloadOptions, beside: int = 0) -> None:
        """
        Args:
            blocks: on the device.
            options: where they go.
            beside: bytes on the device that are taken for other blocks.

        Raises:
            ResourceError: no memory, not even for one block, or no file.
        """
        places, waiting = options.memory // blocks.block_bytes, 0
        if options.folder is not None:
            waiting = max(1, places // _WAITING_SHARE)
        if places <= waiting:
            least = f"{'two blocks' if waiting else 'a block'} of {blocks.block_bytes / 2**20:.2f} MiB"
            raise ResourceError(f"--kv-offload of {options.memory:,} bytes does not hold {least}; give more")
        self._host = HostTier(blocks, places - waiting, beside)
        self.disk = None if options.folder is None else DiskTier(options.folder, blocks.block_bytes, waiting)
        self._host_index, self._disk_index = _Index(places - waiting), _Index(0 if self.disk is None else self.disk.places)
        self._saved = self._fetched = self._dropped = 0
        if self.disk is not None:
            weakref.finalize(self, self.disk.close)

    def __len__(self) -> int:
        return len(self._host_index.held) + len(self._disk_index.held)

    def find(self, key: Key) -> int | None:
        """The node at the end of a stored block, which is then the last to go; None where it is not stored."""
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
        """Keep a block of the device that is about to hold something else."""
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
        """Copy a stored block to the device; False where it is not stored or not intact, and then nobody finds it again."""
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
        """Assert that every place is accounted for, and that no block is stored twice."""
        self._host_index.check()
        self._disk_index.check()
        assert not self._host_index.held.keys() & self._disk_index.held.keys()

    def nodes(self) -> dict[Key, int]:
        """Key -> node of every stored block."""
        return {key: stored.node for tier in (self._host_index, self._disk_index) for key, stored in tier.held.items()}

    def _spill(self) -> None:
        """Move the longest unused block out of memory, to the file if there is one that keeps up."""
        key, stored = next(iter(self._host_index.held.items()))
        if self.disk is not None and self._disk_index.places:
            if self.disk.busy:
                self._dropped += 1
            else:
                self._file_away(self.disk, key, stored)
        self._host_index.remove(key)

    def _file_away(self, file: DiskTier, key: Key, stored: _Stored) -> None:
        """Have a block written that is in memory; the file's own longest unused one makes way."""
        place = self._disk_index.free_place()
        if place is None:
            self._disk_index.remove(next(iter(self._disk_index.held)))
            place = self._disk_index.free_place()
        assert place is not None
        file.write(place, self._host.read(stored.place).clone())
        self._disk_index.held[key] = _Stored(stored.node, place)
