"""CUDA graphs without a GPU: a fake CUDA records what is captured, and computes it again at every replay."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit.runtime.core.batch import Batch
from quantkit.runtime.model.cuda_graphs import CudaGraphBackend, bucket

VOCAB, BLOCK_SIZE, MAX_LEN = 5, 4, 30


def compute(batch: Batch, draft: bool) -> Tensor:
    """Logits that reveal everything about a row's sequence; asserts that padding looks like padding."""
    width, new = batch.block_table.shape[1], batch.max_query_len
    assert width == -(-MAX_LEN // BLOCK_SIZE)
    rows = []
    for row, slot in enumerate(batch.slot_mapping.tolist()):
        length = int(batch.seq_lens[row // new])
        assert batch.query_start[row // new : row // new + 2].tolist() == [row // new * new, (row // new + 1) * new]
        assert (slot == -1) == (length == 0)
        assert slot >= 0 or int(batch.positions[row]) == 0
        blocks = batch.block_table[row // new, : -(-length // BLOCK_SIZE)].sum()
        rows.append(
            torch.stack([batch.token_ids[row], batch.positions[row], blocks, torch.tensor(length), torch.tensor(slot)])
        )
    return torch.stack(rows).float() + 1000 * draft


class Device:
    """A fake CUDA: a capture allocates results once, and every replay overwrites them."""

    def __init__(self) -> None:
        self.capturing: Any = None
        self.captures: list[tuple[int, int, bool]] = []

    def run(self, batch: Batch, draft: bool) -> Tensor:
        """The model."""
        out = compute(batch, draft)
        if self.capturing is not None:
            self.captures.append((len(batch.seq_lens), batch.max_query_len, draft))
            self.capturing.replay = lambda: out.copy_(compute(batch, draft))
            out.fill_(float("nan"))  # A capture computes nothing.
        return out

    @contextmanager
    def graph(self, graph: Any, pool: Any) -> Iterator[None]:
        """`torch.cuda.graph`."""
        self.capturing = graph
        yield
        self.capturing = None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    fake = Device()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: "pool"))
    monkeypatch.setattr(torch.cuda, "graph", fake.graph)
    return fake


def step(lengths: list[int], new: int, blocks: int | None = None) -> Batch:
    """A step over the last `new` tokens of each sequence; the block table is as wide as the longest sequence."""
    width = blocks or max(-(-length // BLOCK_SIZE) for length in lengths)
    positions = torch.cat([torch.arange(length - new, length) for length in lengths])
    table = torch.arange(len(lengths) * width, dtype=torch.int32).view(len(lengths), width) + 3
    rows = torch.arange(len(lengths)).repeat_interleave(new)
    return Batch(
        token_ids=7 * torch.arange(len(positions)) + len(lengths),
        positions=positions,
        slot_mapping=table[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_table=table,
        query_start=torch.arange(len(lengths) + 1, dtype=torch.int32) * new,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        logit_rows=torch.arange(len(positions)),
        max_query_len=new,
        max_seq_len=max(lengths),
    )


def eager(batch: Batch, draft: bool) -> Tensor:
    """The same without a graph, with a block table as wide as the static one."""
    missing = -(-MAX_LEN // BLOCK_SIZE) - batch.block_table.shape[1]
    return compute(Batch(**{**vars(batch), "block_table": torch.nn.functional.pad(batch.block_table, (0, missing))}), draft)


def graphs(device: Device, max_batch: int = 24) -> CudaGraphBackend:
    cache: Any = SimpleNamespace(block_size=BLOCK_SIZE, device=torch.device("cpu"))
    return CudaGraphBackend(device.run, cache, MAX_LEN, max_batch)


def test_replays_give_what_the_model_does(device: Device) -> None:
    decode = graphs(device)
    cases = [([30, 9, 4], 1), ([1], 1), ([2, 3, 17, 30], 1), ([5], 1), ([9, 8, 7], 3), ([30] * 17, 1), ([6, 5, 30], 1)]
    for lengths, new in cases + cases:
        for draft in (False, True):
            batch = step(lengths, new)
            assert decode.supports(batch)
            found = decode.forward(batch, draft)
            assert torch.equal(found, eager(batch, draft))
    sizes = {(4, 1), (1, 1), (4, 3), (24, 1)}
    assert sorted(device.captures) == sorted((*size, draft) for size in sizes for draft in (False, True))


def test_results_are_not_overwritten_by_the_next_step(device: Device) -> None:
    decode = graphs(device)
    first = decode.forward(step([9], 1), False)
    kept = first.clone()
    decode.forward(step([12], 1), False)
    assert torch.equal(first, kept)


def test_other_steps_take_the_long_way(device: Device) -> None:
    decode = graphs(device, max_batch=4)
    mixed = step([9, 9], 2)
    for batch in (
        step([20], 17),
        step([3] * 5, 1),
        Batch(**{**vars(mixed), "logit_rows": torch.tensor([1, 3])}),
        Batch(**{**vars(mixed), "max_query_len": 3}),
    ):
        assert not decode.supports(batch)
    assert not device.captures


def test_buckets_hold_their_sequences_and_not_many_more() -> None:
    for count in range(1, 100):
        assert count <= bucket(count, 100) <= max(2 * count - 1, count + 15, 1)
    assert len({bucket(count, 256) for count in range(1, 257)}) == 5 + 15
