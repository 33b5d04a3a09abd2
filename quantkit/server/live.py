"""What the page at `/` shows: where the engine stands, and how fast requests were served lately."""

import statistics
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from quantkit.runtime.core import latency
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.stats import EngineStats

#: Seconds over which tokens are counted, and samples over which times are ranked.
WINDOW, SAMPLES = 10.0, 512


class Live:
    """Implements `Observer`."""

    def __init__(self, model_name: str, stats: EngineStats) -> None:
        """`stats`: where the engine stands before its first step."""
        self._model_name, self._stats = model_name, stats
        #: When steps ended, and how many tokens they gave.
        self._steps: deque[tuple[float, int]] = deque()
        self._ttft: deque[float] = deque(maxlen=SAMPLES)
        self._tpot: deque[float] = deque(maxlen=SAMPLES)
        self._served = 0

    def arrived(self, request_id: int, request: Request) -> None:
        """See `Observer`."""

    def refused(self, reason: str) -> None:
        """See `Observer`."""

    def stepped(self, outputs: Sequence[Output], stats: EngineStats, at: float) -> None:
        """See `Observer`."""
        self._stats = stats
        self._steps.append((at, sum(len(output.token_ids) for output in outputs)))
        self._forget(at)
        self._ttft.extend(latency.ttft(output) for output in outputs if latency.is_first(output))
        served = [output for output in outputs if latency.is_completed(output)]
        self._served += len(served)
        self._tpot.extend(time for output in served if (time := latency.tpot(output)) is not None)

    def snapshot(self, now: float | None = None) -> dict[str, Any]:
        """Plain data for JSON: counts of samples and tokens, shares from 0 to 1, seconds; None where nothing is known.

        Args:
            now: in seconds of `time.monotonic()`, where it is not this moment.
        """
        self._forget(time.monotonic() if now is None else now)
        stats = self._stats
        return {
            "model": self._model_name,
            "running": stats.running,
            "waiting": stats.waiting,
            "served": self._served,
            "preemptions": stats.preemptions,
            "tokens_per_second": sum(count for _, count in self._steps) / WINDOW,
            "ttft_seconds": percentiles(self._ttft),
            "tpot_seconds": percentiles(self._tpot),
            "kv_usage": stats.used_blocks / max(stats.num_blocks, 1),
            "prefix_hit_rate": stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else None,
            "acceptance_rate": None if stats.speculation is None else stats.speculation.acceptance_rate,
        }

    def _forget(self, now: float) -> None:
        while self._steps and self._steps[0][0] <= now - WINDOW:
            self._steps.popleft()


def percentiles(values: Collection[float]) -> dict[str, float] | None:
    """50th, 90th and 99th, interpolated; None of nothing."""
    if not values:
        return None
    # Of a single value there are no quantiles, of the same one twice there are.
    cuts = statistics.quantiles(list(values) * (2 if len(values) == 1 else 1), n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
