"""Latency and throughput from the times at which text arrived. All times are in seconds.

Per request, with n output tokens:

    TTFT = first chunk that holds text - arrival
    ITL  = gap between consecutive chunks that hold text
    E2E  = chunk with the finish reason - arrival
    TPOT = (E2E - TTFT) / (n - 1), undefined for n = 1

Per run, whose wall time goes from the first arrival to the end of the last request, failed ones included:

    system TPS = output tokens of all completed requests / wall
    user TPS   = 1 / TPOT, for its mean, median and 99th percentile alike: 99% of the requests are at least that fast
    RPS        = completed requests / wall
    goodput    = completed requests within the latency limits / wall

A request arrives when it is due, not when the client sends it, so a slow client does not make the server look faster.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class RequestRecord:
    """What a client observed of one request. All times are on the same clock.

    Attributes:
        arrival: when the request was due.
        end: when it completed or failed.
        chunks: when each chunk with text arrived.
        prompt_tokens, output_tokens: as counted by the server.
        error: why the request failed; None: it completed.
    """

    arrival: float
    end: float
    chunks: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def e2e(self) -> float:
        """See the module's docstring."""
        return self.end - self.arrival

    @property
    def ttft(self) -> float:
        """See the module's docstring; for an output without text, the time to its end."""
        return (self.chunks[0] if self.chunks else self.end) - self.arrival

    @property
    def tpot(self) -> float | None:
        """See the module's docstring; None for a single token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """See the module's docstring."""
        return [after - before for before, after in pairwise(self.chunks)]


@dataclass(frozen=True)
class Spread:
    """Mean, median and 99th percentile (interpolated between the two nearest)."""

    mean: float
    median: float
    p99: float

    @property
    def inverse(self) -> "Spread | None":
        """One over each; None where one is 0."""
        each = self.mean, self.median, self.p99
        return Spread(*(1 / value for value in each)) if all(each) else None


@dataclass(frozen=True)
class Limits:
    """Latency limits for goodput: largest TTFT and TPOT in seconds; None: no limit."""

    ttft: float | None = None
    tpot: float | None = None

    def hold(self, record: RequestRecord) -> bool:
        """Whether a request completed within the limits."""
        slow = self.ttft is not None and record.ttft > self.ttft
        slow |= self.tpot is not None and record.tpot is not None and record.tpot > self.tpot
        return record.error is None and not slow


@dataclass(frozen=True)
class Figures:
    """The numbers of a run; see the module's docstring. A spread is None if no completed request has such a value.

    Attributes:
        requests, completed: number of requests.
        errors: reason -> number of requests that failed for it.
        wall_seconds: duration of the run.
        prompt_tokens, output_tokens: total over completed requests.
        system_tps, rps: output tokens and completed requests per second.
        goodput: requests per second; None without limits.
        ttft, itl, tpot, e2e: seconds; user_tps: tokens/s.
    """

    requests: int
    completed: int
    errors: dict[str, int]
    wall_seconds: float
    prompt_tokens: int
    output_tokens: int
    system_tps: float
    rps: float
    goodput: float | None
    ttft: Spread | None
    itl: Spread | None
    tpot: Spread | None
    user_tps: Spread | None
    e2e: Spread | None


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of some numbers; None if there are none."""
    if not values:
        return None
    return Spread(float(np.mean(values)), float(np.median(values)), float(np.percentile(values, 99)))


def figures(records: Sequence[RequestRecord], limits: Limits) -> Figures:
    """The figures of a run of at least one request."""
    done = [record for record in records if record.error is None]
    wall = max(record.end for record in records) - min(record.arrival for record in records)
    tokens = sum(record.output_tokens for record in done)
    tpot = spread([record.tpot for record in done if record.tpot is not None])
    limited = limits != Limits()
    return Figures(
        requests=len(records),
        completed=len(done),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        wall_seconds=wall,
        prompt_tokens=sum(record.prompt_tokens for record in done),
        output_tokens=tokens,
        system_tps=tokens / wall,
        rps=len(done) / wall,
        goodput=sum(map(limits.hold, records)) / wall if limited else None,
        ttft=spread([record.ttft for record in done]),
        itl=spread([gap for record in done for gap in record.itl]),
        tpot=tpot,
        user_tps=None if tpot is None else tpot.inverse,
        e2e=spread([record.e2e for record in done]),
    )
