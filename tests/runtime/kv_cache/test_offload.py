"""Known prefixes outside of the model's cache: blocks come back intact, and blocks that fail are computed again."""

import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.fake_model import FakeModel, expected
from quantkit.errors import QuantkitError
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.kv_cache import host_tier
from quantkit.runtime.kv_cache.cache import KVCache
from quantkit.runtime.kv_cache.cache_format import cache_format
from quantkit.runtime.kv_cache.disk_tier import DiskTier
from quantkit.runtime.kv_cache.dtype_base import LayerShape
from quantkit.runtime.kv_cache.offload import KVOffload
from quantkit.runtime.kv_cache.options import OffloadOptions

SIZE = 4
CPU = torch.device("cpu")
TEXTS = [[(5 * i + 13 * n) % 97 for i in range(33)] for n in range(8)]


class StoredModel(FakeModel):
    """A model whose blocks are bytes: the position and the token of every slot."""

    def __init__(self, num_blocks: int = 12) -> None:
        super().__init__(num_blocks, SIZE, max_model_len=48)
        self.device, self.block_bytes, self.nbytes = CPU, SIZE * 16, num_blocks * SIZE * 16

    def export_block(self, block: int) -> Tensor:
        slots = self._slots[block * SIZE : (block + 1) * SIZE]
        return torch.tensor([slot or (-1, -1) for slot in slots]).view(-1).view(torch.uint8)

    def import_block(self, block: int, data: Tensor) -> None:
        pairs: list[list[int]] = data.clone().view(torch.int64).view(SIZE, 2).tolist()
        self._slots[block * SIZE : (block + 1) * SIZE] = [(position, token) for position, token in pairs]


def opened(places: int, folder: Path | None = None, blocks: int = 12) -> tuple[Engine, KVOffload]:
    """An engine whose offload holds `places` blocks in host memory. The cache holds one text and a third of another.

    As many as come may wait for a file, so that nothing depends on the disk's pace.
    """
    model = StoredModel(blocks)
    total = places if folder is None else next(n for n in count(places + 1) if n - max(1, n // 8) == places)
    offload = KVOffload(model, OffloadOptions(total * model.block_bytes, folder))
    assert offload._host_index.places == places
    if offload.disk is not None:
        offload.disk.room = 1000
    return Engine(model, EngineConfig(max_batch=2, token_budget=64), offload=offload), offload


def written(offload: KVOffload) -> None:
    """Wait until no block waits for the file."""
    file = offload.disk
    assert file is not None
    with file._lock:
        assert file._lock.wait_for(lambda: not file._waiting, timeout=60)


def file_of(offload: KVOffload) -> int:
    """The descriptor of its file, which has no name."""
    assert offload.disk is not None
    return offload.disk._file


def run(running: Engine, *texts: list[int]) -> list[int]:
    """Continue each text, one after another; returns how many tokens of each were found in a cache."""
    cached = []
    for text in texts:
        running.add(Request(text, SamplingParams(temperature=0, max_tokens=4)))
        tokens = []
        while running.has_work:
            for output in running.step():
                assert output.error is None
                tokens += output.token_ids
                usage = output.usage
            running.check()
        assert tokens == expected(text, 4)
        cached.append(usage.cached)
    return cached


def test_a_prefix_that_left_the_cache_is_fetched_and_not_computed() -> None:
    running, offload = opened(places=100)
    assert run(running, *TEXTS[:4]) == [0, 0, 0, 0]
    assert run(running, *TEXTS[:4]) == [32, 32, 32, 32]
    model = running.model
    assert isinstance(model, StoredModel)
    model.batches.clear()
    run(running, TEXTS[1])
    assert [tokens for _, tokens in model.batches] == [1, 1, 1, 1]
    assert offload.stats.fetched > 24
    assert offload.stats.lost == 0
    stats = running.stats.offload
    assert stats == offload.stats
    without = Engine(StoredModel(), EngineConfig(max_batch=2, token_budget=64))
    assert run(without, *TEXTS[:4], *TEXTS[:4])[4:7] == [0, 0, 0]


def test_the_longest_unused_goes_first() -> None:
    running, offload = opened(places=16)
    run(running, *TEXTS[:6])
    # The cache and 16 blocks hold the last texts; the first ones are gone.
    assert run(running, TEXTS[5], TEXTS[4], TEXTS[0]) == [32, 32, 0]
    assert len(offload) == 16


def test_a_file_takes_what_memory_does_not_hold(tmp_path: Path) -> None:
    running, offload = opened(places=2, folder=tmp_path)
    run(running, *TEXTS[:6])
    assert run(running, *TEXTS[:6]) == [32] * 6
    assert offload.stats.lost == 0
    assert os.fstat(file_of(offload)).st_size > 0
    assert list(tmp_path.iterdir()) == []  # So nothing is left over if the process is killed now.


def _flip(file: int) -> None:
    middle = os.fstat(file).st_size // 2
    os.pwrite(file, bytes([os.pread(file, 1, middle)[0] ^ 1]), middle)


def _truncate(file: int) -> None:
    os.truncate(file, os.fstat(file).st_size // 3)


def _empty(file: int) -> None:
    os.truncate(file, 0)


def _shift(file: int) -> None:
    """Exchange whole blocks."""
    data = os.pread(file, os.fstat(file).st_size, 0)
    os.pwrite(file, data[SIZE * 16 :] + data[: SIZE * 16], 0)


@pytest.mark.parametrize("damage", [_flip, _truncate, _empty, _shift])
def test_what_comes_back_damaged_is_computed_anew(tmp_path: Path, damage: Callable[[int], None]) -> None:
    running, offload = opened(places=1, folder=tmp_path)
    run(running, *TEXTS[:6])
    written(offload)
    damage(file_of(offload))
    run(running, *TEXTS[:6])  # asserts the tokens
    assert offload.stats.lost > 0


class _Gate:
    """Replaces `os.pwrite` with a disk that blocks every write until `open` is set."""

    def __init__(self) -> None:
        self.open, self.begun, self._write = threading.Event(), threading.Event(), os.pwrite

    def __call__(self, file: int, data: memoryview, offset: int) -> int:
        self.begun.set()
        assert self.open.wait(60)
        return self._write(file, data, offset)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Gate]:
    disk = _Gate()
    monkeypatch.setattr(os, "pwrite", disk)
    yield disk
    disk.open.set()


def test_no_step_waits_for_the_disk_and_what_waits_comes_back_from_memory(tmp_path: Path, gate: _Gate) -> None:
    running, offload = opened(places=2, folder=tmp_path)
    assert run(running, *TEXTS[:6], *TEXTS[:6]) == [0] * 6 + [32] * 6
    assert os.fstat(file_of(offload)).st_size == 0
    gate.open.set()
    written(offload)
    assert run(running, *TEXTS[:6]) == [32] * 6
    assert offload.stats.lost == 0


def test_a_disk_that_is_too_slow_costs_what_may_not_wait(tmp_path: Path, gate: _Gate) -> None:
    running, offload = opened(places=14, folder=tmp_path)
    assert offload.disk is not None
    offload.disk.room = 3
    assert run(running, *TEXTS[:6]) == [0] * 6
    assert offload.stats.lost == offload.stats.saved - 14 - 3
    assert len(offload) == 14 + 3
    # The last blocks of the first text wait, because ends of prefixes leave before their starts.
    assert run(running, TEXTS[5], TEXTS[0]) == [32, 0]
    gate.open.set()  # so that the file can be closed


def test_a_place_that_is_filled_anew_while_it_is_written_holds_the_newer_block(tmp_path: Path, gate: _Gate) -> None:
    file = DiskTier(tmp_path, 8, room=2)
    old, new = (torch.full((8,), byte, dtype=torch.uint8) for byte in (1, 2))
    file.write(0, old)
    assert gate.begun.wait(60)
    file.write(0, new)
    gate.open.set()
    with file._lock:
        assert file._lock.wait_for(lambda: not file._waiting, timeout=60)
    read = file.read(0)
    assert read is not None
    assert torch.equal(read, new)
    assert file.lost == 0
    file.close()


def test_closing_waits_for_one_write_and_drops_the_others(tmp_path: Path, gate: _Gate) -> None:
    file = DiskTier(tmp_path, 8, room=100)
    for place in range(100):
        file.write(place, torch.zeros(8, dtype=torch.uint8))
    assert file.busy
    assert gate.begun.wait(60)
    threading.Timer(0.05, gate.open.set).start()
    file.close()
    assert not file._writer.is_alive()
    assert len(file._waiting) >= 99
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("taken", [None, 17])
def test_a_full_disk_costs_what_it_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int | None) -> None:
    def write(_file: int, _data: memoryview, _offset: int) -> int:
        if taken is None:
            raise OSError(28, "No space left on device")
        return taken

    monkeypatch.setattr(os, "pwrite", write)
    running, offload = opened(places=12, folder=tmp_path)
    for text in TEXTS[:6]:
        assert run(running, text) == [0]
        written(offload)
    assert offload.stats.lost == offload.stats.saved - 12
    # A lost block does not count as stored: it is saved when it leaves the device again.
    assert run(running, TEXTS[5], TEXTS[0], TEXTS[1], TEXTS[0]) == [32, 0, 0, 32]


def test_a_full_file_drops_its_longest_unused(tmp_path: Path) -> None:
    running, offload = opened(places=1, folder=tmp_path)
    assert offload.disk is not None
    offload._disk_index.places = 10
    run(running, *TEXTS)
    assert len(offload) == 11
    assert run(running, TEXTS[7], TEXTS[0]) == [32, 0]


def test_a_text_that_is_computed_again_keeps_what_is_known_behind_it() -> None:
    running, offload = opened(places=100)
    run(running, *TEXTS[:3])
    # The host tier loses the first block of a text: the whole text is computed again, and its blocks form a new chain.
    first = next(key for key in offload.nodes() if key[1] == tuple(TEXTS[0][:SIZE]))
    offload._host_index.remove(first)
    assert run(running, TEXTS[0]) == [0]
    assert run(running, TEXTS[1], TEXTS[2], TEXTS[0]) == [32, 32, 32]


@pytest.mark.parametrize("seed", range(20))
def test_random_prefixes_forks_and_preemption(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    running, offload = opened(draw.randint(1, 20), tmp_path if draw.random() < 0.7 else None, blocks=draw.randint(11, 24))
    if draw.random() < 0.5:
        offload._disk_index.places = min(offload._disk_index.places, draw.randint(0, 20))
    pending: dict[int, list[int]] = {}
    found: dict[tuple[int, int], list[int]] = {}
    arrivals = 30
    while arrivals or running.has_work:
        if arrivals and draw.random() < 0.5:
            arrivals -= 1
            text = draw.choice(TEXTS)[: draw.randint(1, 33)]
            request = Request(text, SamplingParams(temperature=0, max_tokens=8, n=draw.choice([1, 1, 2])))
            pending[running.add(request)] = text
        if draw.random() < 0.03 and running.has_work:
            running.cancel(draw.choice(list(pending)))
        if draw.random() < 0.05 and offload.disk is not None and os.fstat(file_of(offload)).st_size:
            _flip(file_of(offload))
        for output in running.step():
            assert output.error is None
            found.setdefault((output.request_id, output.index), []).extend(output.token_ids)
        running.check()
    for (request_id, _), tokens in found.items():
        assert tokens == expected(pending[request_id], 8)[: len(tokens)]
    assert running.stats.used_blocks == 0


@pytest.mark.parametrize("dtype", [torch.float32, "bf16", torch.float16, "fp8", "int8", "int4", "int4+4"])
def test_a_block_of_the_cache_is_its_bytes(dtype: str | torch.dtype) -> None:
    shapes = [LayerShape(2, 8, 8), LayerShape(1, 8, 4)]
    form = cache_format(dtype, torch.float32, shapes, CPU)
    cache, other = (KVCache(shapes, 5, 4, form, CPU, tail_pages=2) for _ in range(2))
    for tensor in cache._block_tensors:
        tensor.random_(256)
    for tensor in other._block_tensors:
        tensor.zero_()
    data = cache.export_block(3)
    assert data.shape == (cache.block_bytes,)
    other.import_block(1, data)
    for ours, theirs in zip(cache._block_tensors, other._block_tensors, strict=True):
        assert torch.equal(ours[3], theirs[1])
        assert not theirs[[0, 2, 3, 4]].any()


def test_what_cannot_work_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = StoredModel()
    with pytest.raises(QuantkitError, match=r"^--kv-offload of 63 bytes does not hold a block of 0.00 MiB; give more$"):
        KVOffload(model, OffloadOptions(63))
    with pytest.raises(QuantkitError, match=r"^--kv-offload of 127 bytes does not hold two blocks of 0.00 MiB; give more$"):
        KVOffload(model, OffloadOptions(127, tmp_path))
    full = r"GiB are free after the KV cache is allocated; ask for less$"
    with pytest.raises(QuantkitError, match=rf"^--kv-offload: 1,073,741,824.0 GiB are asked for and [\d.]+ {full}"):
        KVOffload(model, OffloadOptions(1 << 60))
    monkeypatch.setattr(host_tier, "available_memory", lambda: model.nbytes + 10 * model.block_bytes)
    KVOffload(model, OffloadOptions(10 * model.block_bytes))
    with pytest.raises(QuantkitError, match=rf"^--kv-offload: 0.0 GiB are asked for and 0.0 {full}"):
        KVOffload(model, OffloadOptions(11 * model.block_bytes))
    with pytest.raises(QuantkitError, match=rf"^--kv-offload: 0.0 GiB are asked for and 0.0 {full}"):
        KVOffload(model, OffloadOptions(10 * model.block_bytes), other_bytes=model.block_bytes)  # a draft model's
    missing = tmp_path / "missing"
    message = f"--kv-offload-dir {missing}: cannot be written to (No such file or directory); name a folder that can"
    with pytest.raises(QuantkitError, match=f"^{re.escape(message)}$"):
        KVOffload(model, OffloadOptions(640, missing))
    with pytest.raises(QuantkitError, match=r"^--kv-offload saves cached prefixes, but prefix caching is off"):
        Engine(model, EngineConfig(prefix_caching=False), offload=KVOffload(model, OffloadOptions(640)))
