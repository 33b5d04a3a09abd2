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
from pathlib import Path
from typing import NamedTuple

from quantkit.errors import ResourceError
from quantkit.runtime.kv_cache.disk_tier import BlockFile
from quantkit.runtime.kv_cache.host_tier import Blocks, HostMemory

#: The node before a block, and the block's tokens.
Key = tuple[int, tuple[int, ...]]

#: One block in so many that the memory holds is kept for those on their way to the file.
_WAITING_SHARE = 8


@dataclass(frozen=True)
class Offload:
    """Where blocks go.

    Attributes:
        memory: bytes of host memory, blocks on their way to the file included.
        folder: for a file that takes what the memory does not hold; None: it is dropped.
    """

    memory: int
    folder: Path | None = None


class OffloadStats(NamedTuple):
    """Blocks saved and fetched back since the start; lost ones the file did not take, or not in time, or gave back damaged."""

    saved: int
    fetched: int
    lost: int


@dataclass(frozen=True)
class _Stored:
    node: int
    place: int


class _Tier:
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


class BlockStore:
    """Blocks by what they hold.

    Attributes:
        file: behind the memory, or None.
    """

    def __init__(self, blocks: Blocks, offload: Offload, beside: int = 0) -> None:
        """
        Args:
            blocks: on the device.
            offload: where they go.
            beside: bytes on the device that are taken for other blocks.

        Raises:
            ResourceError: no memory, not even for one block, or no file.
        """
        places, waiting = offload.memory // blocks.block_bytes, 0
        if offload.folder is not None:
            waiting = max(1, places // _WAITING_SHARE)
        if places <= waiting:
            least = f"{'two blocks' if waiting else 'a block'} of {blocks.block_bytes / 2**20:.2f} MiB"
            raise ResourceError(f"--kv-offload of {offload.memory:,} bytes does not hold {least}; give more")
        self._memory = HostMemory(blocks, places - waiting, beside)
        self.file = None if offload.folder is None else BlockFile(offload.folder, blocks.block_bytes, waiting)
        self._near, self._far = _Tier(places - waiting), _Tier(0 if self.file is None else self.file.places)
        self._saved = self._fetched = self._dropped = 0
        if self.file is not None:
            weakref.finalize(self, self.file.close)

    def __len__(self) -> int:
        return len(self._near.held) + len(self._far.held)

    def find(self, key: Key) -> int | None:
        """The node at the end of a stored block, which is then the last to go; None where it is not stored."""
        far = self._far.held.get(key)
        if far is not None and self.file is not None and not self.file.holds(far.place):
            self._far.remove(key)  # The disk did not take it.
        for tier in (self._near, self._far):
            if key in tier.held:
                tier.held.move_to_end(key)
                return tier.held[key].node
        return None

    @property
    def stats(self) -> OffloadStats:
        """Counts so far."""
        lost = self._dropped + (0 if self.file is None else self.file.lost)
        return OffloadStats(self._saved, self._fetched, lost)

    def save(self, key: Key, node: int, block: int) -> None:
        """Keep a block of the device that is about to hold something else."""
        if self.find(key) is not None:
            return
        place = self._near.free_place()
        if place is None:
            self._spill()
            place = self._near.free_place()
        assert place is not None
        self._memory.put(place, block)
        self._near.held[key] = _Stored(node, place)
        self._saved += 1

    def load(self, key: Key, block: int) -> bool:
        """Copy a stored block to the device; False where it is not stored or not intact, and then nobody finds it again."""
        if key in self._near.held:
            self._memory.get(self._near.held[key].place, block)
        elif key in self._far.held:
            assert self.file is not None
            data = self.file.read(self._far.held[key].place)
            if data is None:
                self._far.remove(key)
                return False
            self._memory.send(data, block)
        else:
            return False
        self._fetched += 1
        return True

    def check(self) -> None:
        """Assert that every place is accounted for, and that no block is stored twice."""
        self._near.check()
        self._far.check()
        assert not self._near.held.keys() & self._far.held.keys()

    def nodes(self) -> dict[Key, int]:
        """Key -> node of every stored block."""
        return {key: stored.node for tier in (self._near, self._far) for key, stored in tier.held.items()}

    def _spill(self) -> None:
        """Move the longest unused block out of memory, to the file if there is one that keeps up."""
        key, stored = next(iter(self._near.held.items()))
        if self.file is not None and self._far.places:
            if self.file.busy:
                self._dropped += 1
            else:
                self._file_away(self.file, key, stored)
        self._near.remove(key)

    def _file_away(self, file: BlockFile, key: Key, stored: _Stored) -> None:
        """Have a block written that is in memory; the file's own longest unused one makes way."""
        place = self._far.free_place()
        if place is None:
            self._far.remove(next(iter(self._far.held)))
            place = self._far.free_place()
        assert place is not None
        file.write(place, self._memory.read(stored.place).clone())
        self._far.held[key] = _Stored(stored.node, place)
