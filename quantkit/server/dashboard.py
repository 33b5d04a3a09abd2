"""The numbers on the page at `/`: the engine's state and recent throughput and latencies."""

import statistics
import time
from collections import deque
from collections.abc import Collection, Sequence
from typing import Any

from quantkit.runtime.core import latency
from quantkit.runtime.core.output import Output
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.stats import EngineStats

#: Window of the throughput, seconds; and how many recent samples the latency percentiles cover.
WINDOW, SAMPLES = 10.0, 512


class Dashboard:
    """Collects the numbers. Implements `Observer`."""

    def __init__(self, model_name: str, stats: EngineStats) -> None:
        """`stats` is the engine's state before its first step."""
        self._model_name, self._stats = model_name, stats
        #: (when a step ended, how many tokens it produced), within the window.
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
        completed = [output for output in outputs if latency.is_completed(output)]
        self._served += len(completed)
        self._tpot.extend(time for output in completed if (time := latency.tpot(output)) is not None)

    def snapshot(self, now: float | None = None) -> dict[str, Any]:
        """The numbers as plain data for JSON: counts, shares from 0 to 1, seconds; None where there is no value yet.

        Args:
            now: seconds of `time.monotonic()`; None: the current time.
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
    """The 50th, 90th and 99th percentile, interpolated; None without values."""
    if not values:
        return None
    # `quantiles` needs at least two values.
    cuts = statistics.quantiles(list(values) * (2 if len(values) == 1 else 1), n=100, method="inclusive")
    return {"p50": cuts[49], "p90": cuts[89], "p99": cuts[98]}
