"""When requests are sent: by clients that each wait for their answer, or at random times that wait for nobody."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from random import Random

from quantkit.bench.measures import Record

#: Sends the request of a number, which is due at a time of the event loop's clock, and comes back when it is over.
Send = Callable[[int, float], Awaitable[Record]]


@dataclass(frozen=True)
class ClosedLoop:
    """So many clients, each of which sends its next request when its last one is over."""

    concurrency: int

    def __str__(self) -> str:
        return f"{self.concurrency} concurrent"

    @property
    def level(self) -> float:
        """The load as a number."""
        return self.concurrency

    async def run(self, send: Send, count: int) -> list[Record]:
        """Send `count` requests; what became of them, in the order of their numbers."""
        loop, numbers, records = asyncio.get_running_loop(), iter(range(count)), dict[int, Record]()

        async def client() -> None:
            for number in numbers:
                records[number] = await send(number, loop.time())

        await asyncio.gather(*(client() for _ in range(min(self.concurrency, count))))
        return [records[number] for number in range(count)]


@dataclass(frozen=True)
class Poisson:
    """Requests that arrive independently of each other and of the server, `rate` a second on average.

    The times between arrivals are exponentially distributed; a seed gives the same ones again.
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
        """When each of `count` requests arrives, seconds after the start. The first one does not wait."""
        random, times = Random(f"{self.seed}:{self.rate}"), [0.0]
        while len(times) < count:
            times.append(times[-1] + random.expovariate(self.rate))
        return times[:count]

    async def run(self, send: Send, count: int) -> list[Record]:
        """See `ClosedLoop`."""
        loop = asyncio.get_running_loop()
        start = loop.time()

        async def one(number: int, due: float) -> Record:
            await asyncio.sleep(due - loop.time())
            return await send(number, due)

        return list(await asyncio.gather(*(one(i, start + after) for i, after in enumerate(self.arrivals(count)))))


Load = ClosedLoop | Poisson
