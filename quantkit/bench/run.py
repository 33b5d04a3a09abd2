"""`quantkit bench`: one load after another on one server."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from quantkit.bench.client import Client, Workload
from quantkit.bench.load import Load
from quantkit.bench.measures import Figures, Limits, Record, figures


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        url: of the server.
        model: its name there; None: the server's first.
        api_key: what the server asks for; None: nothing.
        loads: one after another.
        requests: of each load.
        workload: what each request asks for.
        limits: for goodput.
    """

    url: str
    model: str | None
    api_key: str | None
    loads: Sequence[Load]
    requests: int
    workload: Workload
    limits: Limits


@dataclass(frozen=True)
class Point:
    """A load, as text and as a number (requests/s or clients), and the figures under it."""

    load: str
    level: float
    figures: Figures


@dataclass(frozen=True)
class BenchReport:
    """Everything that `--json` holds."""

    url: str
    model: str
    workload: Workload
    limits: Limits
    points: list[Point]

    def to_json(self) -> dict[str, Any]:
        """Plain data for `json.dumps`."""
        return asdict(self)


async def measure(
    request: BenchRequest, advance: Callable[[str, int, int], None], transport: httpx.AsyncBaseTransport | None = None
) -> BenchReport:
    """Put the loads on the server, one after another.

    Args:
        request: what to measure.
        advance: called with (load, requests that are over, requests).
        transport: see `Client`.

    Raises:
        QuantkitError: the server cannot be reached, or does not serve this at all. Requests that fail later are counted.
    """
    points = []
    async with Client(request.url, request.workload, request.api_key, transport) as client:
        model = await client.connect(request.model)
        for number, load in enumerate(request.loads):
            records = await _one(client, model, load, number * request.requests, request.requests, advance)
            points.append(Point(str(load), load.level, figures(records, request.limits)))
    return BenchReport(client.url, model, request.workload, request.limits, points)


async def _one(
    client: Client, model: str, load: Load, first: int, count: int, advance: Callable[[str, int, int], None]
) -> list[Record]:
    """The records of one load, whose prompts count from `first`."""
    over = 0
    advance(str(load), 0, count)

    async def send(number: int, due: float) -> Record:
        nonlocal over
        record = await client.send(model, first + number, due)
        over += 1
        advance(str(load), over, count)
        return record

    return await load.run(send, count)


def run(request: BenchRequest, advance: Callable[[str, int, int], None]) -> BenchReport:
    """`measure` in an event loop of its own."""
    return asyncio.run(measure(request, advance))
