"""From when text came to the field's numbers; seconds throughout.

Of one request, with n output tokens:

    TTFT = first chunk that holds text - arrival
    ITL  = gap between consecutive chunks that hold text
    E2E  = chunk that says why the text ended - arrival
    TPOT = (E2E - TTFT) / (n - 1), so not for one token

Of a run, whose wall time goes from the first arrival to the end of the last request, failed ones included:

    system TPS = output tokens of all completed requests / wall
    user TPS   = 1 / TPOT, for its mean, median and 99th percentile alike: 99% of the requests are at least that fast
    RPS        = completed requests / wall
    goodput    = completed requests that are within the limits / wall

A request arrives when it is due, not when the client gets round to sending it: a client that falls behind is no excuse.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Record:
    """What a client saw of one request. All times are of one clock.

    Attributes:
        arrival: when it was due.
        end: when it was over, for better or worse.
        chunks: when each chunk that held text came.
        prompt_tokens, output_tokens: as the server counts them.
        error: why it failed; None: it was completed.
    """

    arrival: float
    end: float
    chunks: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def e2e(self) -> float:
        """See the module."""
        return self.end - self.arrival

    @property
    def ttft(self) -> float:
        """See the module; a text without any text ends with its first chunk."""
        return (self.chunks[0] if self.chunks else self.end) - self.arrival

    @property
    def tpot(self) -> float | None:
        """See the module; None for a single token."""
        return (self.e2e - self.ttft) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl(self) -> list[float]:
        """See the module."""
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
    """What counts for goodput: seconds that TTFT and TPOT may take; None: as long as they like."""

    ttft: float | None = None
    tpot: float | None = None

    def hold(self, record: Record) -> bool:
        """Whether a request was completed within them."""
        slow = self.ttft is not None and record.ttft > self.ttft
        slow |= self.tpot is not None and record.tpot is not None and record.tpot > self.tpot
        return record.error is None and not slow


@dataclass(frozen=True)
class Figures:
    """A run in numbers; see the module. Spreads are None where nothing was completed, or where no request has any.

    Attributes:
        requests, completed: how many.
        errors: why requests failed, and how many did.
        wall_seconds: of the whole run.
        prompt_tokens, output_tokens: of completed requests.
        system_tps, rps: rates.
        goodput: None without limits.
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
    """Of any numbers; None of none."""
    if not values:
        return None
    return Spread(float(np.mean(values)), float(np.median(values)), float(np.percentile(values, 99)))


def figures(records: Sequence[Record], limits: Limits) -> Figures:
    """The numbers of a run of at least one request."""
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
