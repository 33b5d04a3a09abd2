"""`/metrics`: what a Prometheus server reads, under vLLM's names and with its buckets, so that its dashboards fit.

Of vLLM's metrics those are here whose meaning is the same. A sample counts as a request, as there. What drafts are made of and
how many tokens wait is read when it is asked for; what happens to requests is counted as it happens.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quantkit.runtime.request import Request
from quantkit.runtime.sequence import FinishReason, Output
from quantkit.runtime.stats import Stats
from quantkit.server import latency

#: vLLM's buckets (vllm/v1/metrics/loggers.py), in seconds.
TTFT_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
    1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0,
    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

#: vLLM's words for why a request ended.
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}

_LABELS = ("model_name", "engine")


class Metrics:
    """Implements `Observer`."""

    def __init__(self, model_name: str, max_model_len: int, stats: Stats) -> None:
        """
        Args:
            model_name: a label of every metric.
            max_model_len: longest sequence, the last bucket of its parts.
            stats: where the engine stands before its first step.
        """
        self._values = (model_name, "0")
        self._stats = stats
        self._registry = CollectorRegistry()
        self._registry.register(_Standing(self))
        self._prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self._generated = self._counter("generation_tokens", "Number of generation tokens processed.")
        self._ended = Counter(
            "vllm:request_success", "Requests that ended, by reason.", (*_LABELS, "finished_reason"), registry=self._registry
        )
        for reason in _REASONS.values():
            self._ended.labels(*self._values, reason)
        self._refused = Counter("quantkit:requests_refused", "Requests turned away.", ("reason",), registry=self._registry)
        self._ttft = self._histogram("time_to_first_token_seconds", "First token - arrival.", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between two chunks of a text.", TOKEN_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "(End - first token) / (tokens - 1) of a request.", TOKEN_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "End - arrival.", REQUEST_BUCKETS)
        lengths = tuple(_one_two_five(max_model_len))
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", lengths)
        self._outputs = self._histogram("request_generation_tokens", "Tokens that a request was given.", lengths)
        #: When each sample that runs had its last token.
        self._last: dict[tuple[int, int], float] = {}

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def arrived(self, request_id: int, request: Request) -> None:
        """See `Observer`."""

    def refused(self, reason: str) -> None:
        """See `Observer`."""
        self._refused.labels(reason).inc()

    def stepped(self, outputs: Sequence[Output], stats: Stats, at: float) -> None:
        """See `Observer`."""
        self._stats = stats
        for output in outputs:
            if output.token_ids:
                self._count_tokens(output, at)
            if output.finish_reason is not None:
                self._last.pop((output.request_id, output.index), None)
                self._ended.labels(*self._values, _REASONS[output.finish_reason]).inc()
            if latency.is_served(output):
                self._measure(output)

    def standing(self) -> Iterator[Metric]:
        """What is read off the engine's state."""
        stats = self._stats
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", stats.running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", stats.waiting)
        usage = stats.used_blocks / max(stats.num_blocks, 1)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage)
        yield self._total("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries)
        yield self._total("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits)
        yield self._total("num_preemptions", "Requests that gave their KV blocks to older ones.", stats.preemptions)
        drafts = stats.speculation
        if drafts is None:
            return
        yield self._total("spec_decode_num_drafts", "Number of spec decoding drafts.", drafts.drafts)
        yield self._total("spec_decode_num_draft_tokens", "Number of draft tokens.", drafts.drafted)
        yield self._total("spec_decode_num_accepted_tokens", "Number of accepted tokens.", drafts.accepted)
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted tokens per draft position."
        family = CounterMetricFamily(name, text, labels=(*_LABELS, "position"))
        for position, count in enumerate(drafts.accepted_by_position):
            family.add_metric((*self._values, str(position)), count)
        yield family

    def _count_tokens(self, output: Output, at: float) -> None:
        key = output.request_id, output.index
        self._generated.inc(len(output.token_ids))
        if latency.is_first(output):
            self._ttft.observe(latency.ttft(output))
            if output.index == 0:  # the samples of a request share its prompt
                self._prompt_tokens.inc(output.usage.prompt)
        else:
            self._itl.observe(at - self._last[key])
        self._last[key] = at

    def _measure(self, output: Output) -> None:
        """A sample that ended as it should."""
        assert output.timing.finished is not None
        self._e2e.observe(output.timing.finished - output.timing.arrival)
        self._prompts.observe(output.usage.prompt)
        self._outputs.observe(output.usage.generated)
        per_token = latency.tpot(output)
        if per_token is not None:
            self._tpot.observe(per_token)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, _LABELS, registry=self._registry).labels(*self._values)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        made = Histogram(f"vllm:{name}", text, _LABELS, buckets=buckets, registry=self._registry)
        return made.labels(*self._values)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _total(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family


class _Standing:
    """A collector, as prometheus_client wants one."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.standing()


def _one_two_five(most: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > most:
                return
            yield step * scale
        scale *= 10
