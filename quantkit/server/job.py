"""What the event loop and the engine's thread exchange: jobs, their outputs, refusals, and the observers' interface."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.stats import EngineStats


class Observer(Protocol):
    """Sees every request and output of the engine. Its methods run in the event loop and must be quick."""

    def arrived(self, request_id: int, request: Request) -> None:
        """The engine accepted a request; its outputs carry this id."""

    def refused(self, reason: str) -> None:
        """A job was refused: "busy" (the queue is full), "draining" or "invalid"."""

    def stepped(self, outputs: Sequence[Output], stats: EngineStats, at: float) -> None:
        """A step ended.

        Args:
            outputs: what the step produced. A sample's last output has a finish reason; every sample of an accepted request
                gets one.
            stats: the engine's state after the step.
            at: when the step ended, seconds of `time.monotonic()`, which is the clock of the outputs' timing.
        """


class BusyError(Exception):
    """The queue is full."""


class DrainingError(Exception):
    """The server is shutting down and accepts no new requests."""


class EngineDiedError(Exception):
    """The engine's thread ended with an error; no request will run again."""


class Job:
    """The engine requests of one API call while they run. Created by `EngineThread.open`.

    Attributes:
        requests: as given.
        size: number of samples of all requests together.
        accepted: done when the engine has accepted all requests. Where it refuses one, none runs, and this holds the error.
    """

    def __init__(self, requests: Sequence[Request], accepted: "asyncio.Future[None]") -> None:
        self.requests, self.accepted = requests, accepted
        self.size = sum(request.params.n for request in requests)
        #: Number of samples that have not ended.
        self.left = self.size
        #: Ids of the requests in the engine. Only the engine's thread writes this.
        self.ids: list[int] = []
        self.queue: asyncio.Queue[tuple[int, Output] | Exception] = asyncio.Queue()

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Yields outputs as they arrive, each with the number of its sample, counted over all requests.

        Raises:
            EngineDiedError: the engine's thread ended with an error.
        """
        while self.left:
            item = await self.queue.get()
            if isinstance(item, Exception):
                raise item
            self.left -= item[1].finish_reason is not None
            yield item


@dataclass
class ActiveRequest:
    """A request in the engine: its job, the number of its first sample in the job, and how many samples have not ended."""

    job: Job
    first: int
    left: int
