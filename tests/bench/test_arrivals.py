"""The times at which requests are sent."""

import asyncio
import statistics
from itertools import pairwise

import pytest

from helpers.clock import run
from quantkit.bench.load import ClosedLoop, Load, Poisson
from quantkit.bench.measures import RequestRecord


class _Server:
    """A server that takes `number + 1` seconds for request `number`, and counts the requests that run at the same time."""

    def __init__(self) -> None:
        self.sent: list[tuple[int, float]] = []
        self.running = self.most = 0

    async def __call__(self, number: int, due: float) -> RequestRecord:
        now = asyncio.get_running_loop().time()
        assert now == pytest.approx(due)
        self.sent.append((number, now))
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(number + 1)
        self.running -= 1
        return RequestRecord(due, asyncio.get_running_loop().time(), prompt_tokens=number)


def _run(load: Load, count: int) -> tuple[_Server, list[RequestRecord]]:
    server = _Server()
    records = run(load.run(server, count))
    assert [record.prompt_tokens for record in records] == list(range(count))
    return server, records


def test_clients_wait_for_their_answers() -> None:
    """Two clients: 0 ends at 1, so 2 starts there and ends at 4; 1 ends at 2, so 3 starts there and ends at 6."""
    server, records = _run(ClosedLoop(2), 5)
    assert server.most == 2
    assert [number for number, _ in server.sent] == [0, 1, 2, 3, 4]
    assert [at for _, at in server.sent] == pytest.approx([0, 0, 1, 2, 4])
    assert [record.end for record in records] == pytest.approx([1, 2, 4, 6, 9])


def test_more_clients_than_requests() -> None:
    assert _run(ClosedLoop(9), 3)[0].most == 3


def test_arrivals_wait_for_nobody() -> None:
    load = Poisson(4.0, seed=3)
    server, _ = _run(load, 12)
    assert [at for _, at in server.sent] == pytest.approx(load.arrivals(12))
    assert server.most > 4


def test_arrivals_are_poisson() -> None:
    """The mean of 20,000 exponential gaps is within 5 standard errors (1 / sqrt(n)) of 1 / rate, and so is their standard
    deviation (its relative standard error is sqrt(2 / n) for this distribution). The same seed gives the same gaps."""
    load = Poisson(8.0, seed=1)
    times = load.arrivals(20_001)
    gaps = [8.0 * (after - before) for before, after in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1, abs=5 / 20_000**0.5)
    assert statistics.pstdev(gaps) == pytest.approx(1, abs=5 * (2 / 20_000) ** 0.5)
    assert load.arrivals(50) == times[:50]
    assert Poisson(8.0, seed=2).arrivals(50) != times[:50]
    assert load.arrivals(1) == [0.0]
