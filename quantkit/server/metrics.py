"""`/metrics` for Prometheus, with vLLM's names and buckets, so that dashboards made for vLLM work.

Only metrics with the same meaning as in vLLM are exported. Left out are those of features that quantkit lacks (adapters,
images, sleep, KV transfer) and those that follow from others. As in vLLM, each sample counts as a request. Gauges of the
engine's state are read when Prometheus asks; events of requests are counted when they happen.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quantkit.runtime.core import latency
from quantkit.runtime.core.model import Model
from quantkit.runtime.core.output import FinishReason, Output
from quantkit.runtime.core.request import Request
from quantkit.runtime.engine.stats import EngineStats
from quantkit.server.histograms import N_BUCKETS, SAMPLE_HISTOGRAMS, STEP_BUCKETS, TOKEN_BUCKETS, TTFT_BUCKETS, length_buckets

#: Finish reason -> vLLM's name for it.
_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.CANCELLED: "abort",
    FinishReason.ERROR: "error",
}

_LABELS = ("model_name", "engine")


class PrometheusMetrics:
    """Collects the metrics. Implements `Observer`."""

    def __init__(self, model_name: str, model: Model, stats: EngineStats) -> None:
        """
        Args:
            model_name: a label of every metric.
            model: the served model.
            stats: the engine's state before its first step.
        """
        self._values = (model_name, "0")
        self._model, self._stats = model, stats
        self._registry = CollectorRegistry()
        self._registry.register(_StateCollector(self))
        ProcessCollector(registry=self._registry)
        self._prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self._cached_tokens = self._counter("prompt_tokens_cached", "Prompt tokens that were in the prefix cache.")
        self._generated = self._counter("generation_tokens", "Number of generation tokens processed.")
        self._ended = Counter(
            "vllm:request_success", "Requests that ended, by reason.", (*_LABELS, "finished_reason"), registry=self._registry
        )
        for reason in _REASONS.values():
            self._ended.labels(*self._values, reason)
        self._refused = Counter("quantkit:requests_refused", "Requests refused.", ("reason",), registry=self._registry)
        self._ttft = self._histogram("time_to_first_token_seconds", "First token - arrival.", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Time between two chunks of an output.", TOKEN_BUCKETS)
        self._step_tokens = self._histogram(
            "iteration_tokens_total", "Tokens per step; a prompt counts in the step that completes it.", STEP_BUCKETS
        )
        lengths = tuple(length_buckets(model.max_model_len))
        self._measures = [
            (self._histogram(each.name, each.text, each.buckets or lengths), each.of) for each in SAMPLE_HISTOGRAMS
        ]
        self._n = self._histogram("request_params_n", "Samples per request.", N_BUCKETS)
        self._max_tokens = self._histogram("request_params_max_tokens", "Largest tokens per sample allowed.", lengths)
        self._longest = self._histogram("request_max_num_generation_tokens", "Tokens in a request's longest sample.", lengths)
        #: (request id, sample) -> when the running sample got its latest token.
        self._last: dict[tuple[int, int], float] = {}
        #: Running request -> its number of samples, and the lengths of those that have ended.
        self._lengths: dict[int, tuple[int, list[int]]] = {}

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def arrived(self, request_id: int, request: Request) -> None:
        """See `Observer`."""
        params = request.params
        self._lengths[request_id] = params.n, []
        self._n.observe(params.n)
        if params.max_tokens is not None:
            self._max_tokens.observe(params.max_tokens)

    def refused(self, reason: str) -> None:
        """See `Observer`."""
        self._refused.labels(reason).inc()

    def stepped(self, outputs: Sequence[Output], stats: EngineStats, at: float) -> None:
        """See `Observer`."""
        self._stats = stats
        self._step_tokens.observe(sum(self._count_tokens(output, at) for output in outputs if output.token_ids))
        for output in outputs:
            if output.finish_reason is not None:
                self._end(output)

    def state_metrics(self) -> Iterator[Metric]:
        """Metrics of the engine's current state."""
        stats = self._stats
        info = {"block_size": str(self._model.block_size), "num_gpu_blocks": str(stats.num_blocks), "engine": "0"}
        family = GaugeMetricFamily("vllm:cache_config_info", "Tokens per KV block, and number of blocks.", labels=tuple(info))
        family.add_metric(tuple(info.values()), 1)
        yield family
        yield self._gauge("num_requests_running", "Number of requests in model execution batches.", stats.running)
        yield self._gauge("num_requests_waiting", "Number of requests waiting to be processed.", stats.waiting)
        usage = stats.used_blocks / max(stats.num_blocks, 1)
        yield self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", usage)
        yield self._total("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", stats.prefix_queries)
        yield self._total("prefix_cache_hits", "Prompt tokens found in the prefix cache.", stats.prefix_hits)
        yield self._total("num_preemptions", "Requests that lost their KV blocks to older ones.", stats.preemptions)
        drafts = stats.speculation
        if drafts is None:
            return
        yield self._total("spec_decode_num_drafts", "Number of spec decoding drafts.", drafts.drafts)
        yield self._total("spec_decode_num_draft_tokens", "Number of draft tokens.", drafts.drafted)
        yield self._total("spec_decode_num_accepted_tokens", "Number of accepted tokens.", drafts.accepted)
        name, text = "vllm:spec_decode_num_accepted_tokens_per_pos", "Accepted tokens per draft position."
        by_position = CounterMetricFamily(name, text, labels=(*_LABELS, "position"))
        for position, count in enumerate(drafts.accepted_by_position):
            by_position.add_metric((*self._values, str(position)), count)
        yield by_position

    def _count_tokens(self, output: Output, at: float) -> int:
        """Count an output's new tokens; returns how many tokens were computed for it, including those of the prompt."""
        count, key = len(output.token_ids), (output.request_id, output.index)
        self._generated.inc(count)
        if latency.is_first(output):
            self._ttft.observe(latency.ttft(output))
            if output.index == 0:  # samples of a request share its prompt
                self._prompt_tokens.inc(output.usage.prompt)
                self._cached_tokens.inc(output.usage.cached)
                count += output.usage.prompt - output.usage.cached
        else:
            self._itl.observe(at - self._last[key])
        self._last[key] = at
        return count

    def _end(self, output: Output) -> None:
        """Count a sample's last output."""
        assert output.finish_reason is not None
        self._last.pop((output.request_id, output.index), None)
        self._ended.labels(*self._values, _REASONS[output.finish_reason]).inc()
        if latency.is_completed(output):
            for histogram, of in self._measures:
                if (value := of(output)) is not None:
                    histogram.observe(value)
        samples, lengths = self._lengths[output.request_id]
        lengths.append(output.usage.generated)
        if len(lengths) == samples:
            self._longest.observe(max(lengths))
            del self._lengths[output.request_id]

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


class _StateCollector:
    """Adapts `PrometheusMetrics.state_metrics` to the collector interface of prometheus_client."""

    def __init__(self, metrics: PrometheusMetrics) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        return self._metrics.state_metrics()
