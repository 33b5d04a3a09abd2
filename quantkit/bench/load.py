"""Arrival patterns: closed-loop clients that each wait for their answer, or Poisson arrivals that wait for nothing."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from quantkit.bench.measures import RequestRecord

#: (request number, due time on the event loop's clock) -> record, once the request is over.
Send = Callable[[int, float], Awaitable[RequestRecord]]


@dataclass(frozen=True)
class ClosedLoop:
    """`concurrency` clients, each of which sends its next request when its previous one is over."""

    concurrency: int

    def __str__(self) -> str:
        return f"{self.concurrency} concurrent"

    @property
    def level(self) -> float:
        """The load as a number."""
        return self.concurrency

    async def run(self, send: Send, count: int) -> list[RequestRecord]:
        """Send `count` requests; returns their records in the order of their numbers."""
        loop, numbers, records = asyncio.get_running_loop(), iter(range(count)), dict[int, RequestRecord]()

        async def client() -> None:
            for number in numbers:
                records[number] = await send(number, loop.time())

        await asyncio.gather(*(client() for _ in range(min(self.concurrency, count))))
        return [records[number] for number in range(count)]


@dataclass(frozen=True)
class Poisson:
    """Requests that arrive independently of each other and of the server, on average `rate` per second.

    The times between arrivals are exponentially distributed and determined by the seed.
    """

    rate: float
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s"

    @property
    def level(self) -> float:
        """See `ClosedLoop`."""
        return self.rate

    def arrivals(self, count: int) -> list[float]:
        """Arrival times of `count` requests, seconds after the start. The first request arrives at 0."""
        random, times = Random(f"{self.seed}:{self.rate}"), [0.0]
        while len(times) < count:
            times.append(times[-1] + random.expovariate(self.rate))
        return times[:count]

    async def run(self, send: Send, count: int) -> list[RequestRecord]:
        """See `ClosedLoop`."""
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def one(number: int, due: float) -> RequestRecord:
            await asyncio.sleep(due - loop.time())
            return await send(number, due)

        return list(await asyncio.gather(*(one(i, start + after) for i, after in enumerate(self.arrivals(count)))))


Load = ClosedLoop | Poisson
