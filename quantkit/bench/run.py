"""`quantkit bench`: measure one server under a sequence of loads."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from quantkit.bench.client import Client, Workload
from quantkit.bench.load import Load
from quantkit.bench.measures import Figures, Limits, RequestRecord, figures


@dataclass(frozen=True)
class BenchRequest:
    """What to measure.

    Attributes:
        url: the server's URL.
        model: the model's name on the server; None: the first one that the server lists.
        api_key: sent to the server; None: no key.
        loads: applied one after another.
        requests: number of requests per load.
        workload: what each request asks for.
        limits: latency limits for goodput.
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
    """One load, as text and as a number (requests/s or clients), and the figures measured under it."""

    load: str
    level: float
    figures: Figures


@dataclass(frozen=True)
class BenchReport:
    """The content of `--json`."""

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
    """Apply the loads to the server, one after another.

    Args:
        request: what to measure.
        advance: called with (load, finished requests, requests).
        transport: see `Client`.

    Raises:
        QuantkitError: the server cannot be reached, or fails the first request. Requests that fail later are counted.
    """
    points = []
    async with Client(request.url, request.workload, request.api_key, transport) as client:
        model = await client.connect(request.model)
        for number, load in enumerate(request.loads):
            records = await _run_load(client, model, load, number * request.requests, request.requests, advance)
            points.append(Point(str(load), load.level, figures(records, request.limits)))
    return BenchReport(client.url, model, request.workload, request.limits, points)


async def _run_load(
    client: Client, model: str, load: Load, first: int, count: int, advance: Callable[[str, int, int], None]
) -> list[RequestRecord]:
    """The records of one load, whose prompts are numbered from `first`."""
    over = 0
    advance(str(load), 0, count)

    async def send(number: int, due: float) -> RequestRecord:
        nonlocal over
        record = await client.send(model, first + number, due)
        over += 1
        advance(str(load), over, count)
        return record

    return await load.run(send, count)


def run(request: BenchRequest, advance: Callable[[str, int, int], None]) -> BenchReport:
    """Run `measure` in its own event loop."""
    return asyncio.run(measure(request, advance))
