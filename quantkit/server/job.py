"""What the server hands to the engine's thread, what it gets back, and who may watch."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.stats import EngineStats


class Observer(Protocol):
    """Sees everything that the engine is given and gives back. Its methods are quick: the event loop waits for them."""

    def arrived(self, request_id: int, request: Request) -> None:
        """The engine has accepted a request; its outputs carry the id."""

    def refused(self, reason: str) -> None:
        """Requests were turned away: "busy" (too many wait), "draining" or "invalid"."""

    def stepped(self, outputs: Sequence[Output], stats: EngineStats, at: float) -> None:
        """A step ended.

        Args:
            outputs: what came out; a sample's last output has a finish reason, and every accepted request's samples get one.
            stats: where the engine stands now.
            at: when, in seconds of `time.monotonic()`, the clock of the outputs' timing.
        """


class BusyError(Exception):
    """As many sequences wait as may."""


class DrainingError(Exception):
    """No new requests are taken."""


class EngineDiedError(Exception):
    """The engine's thread has ended with an error; nothing will run again."""


class Job:
    """The engine requests of one call, on their way. Comes from `Runner.open`.

    Attributes:
        requests: as given.
        size: samples of all of them.
        accepted: done when the engine has taken all requests; a `RequestError` when it refuses one, and none runs.
    """

    def __init__(self, requests: Sequence[Request], accepted: "asyncio.Future[None]") -> None:
        self.requests, self.accepted = requests, accepted
        self.size = sum(request.params.n for request in requests)
        #: Samples that have not ended.
        self.left = self.size
        #: Ids of the requests in the engine; the engine's thread writes them.
        self.ids: list[int] = []
        self.queue: asyncio.Queue[tuple[int, Output] | Exception] = asyncio.Queue()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs as they come, each with the number of its sample, counted over all requests.

        Raises:
            EngineDiedError: nothing will come any more.
        """
        while self.left:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            self.left -= item[1].finish_reason is not None
            yield item


@dataclass
class Entry:
    """A request in the engine: its job, the number of its first sample there, and its samples that have not ended."""

    job: Job
    first: int
    left: int
