"""The server's metrics: the parsed Prometheus text and the numbers of the page, compared with engines that ran."""

import time
from collections import abc

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.fake_model import VOCAB, FakeModel, expected
from quantkit.runtime.core.output import FinishReason as End
from quantkit.runtime.core.output import Output, Timing, Usage
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.core.sequence import Draft, Sequence
from quantkit.runtime.engine.engine import Engine, EngineConfig
from quantkit.runtime.engine.stats import EngineStats
from quantkit.runtime.speculative.ngram import NgramProposer
from quantkit.server.dashboard import WINDOW, Dashboard, percentiles
from quantkit.server.histograms import N_BUCKETS, REQUEST_BUCKETS, STEP_BUCKETS, TOKEN_BUCKETS, TTFT_BUCKETS
from quantkit.server.metrics import PrometheusMetrics

LABELS = {"model_name": "tiny", "engine": "0"}
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def parsed(metrics: PrometheusMetrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Value of every sample by its name and its labels, without the labels of the model."""
    found = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith("vllm:"):
                assert {name: labels.pop(name, "tiny") for name in LABELS} == LABELS
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


class Watched:
    """An engine with its observers."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.metrics, self.dashboard = PrometheusMetrics("tiny", engine.model, engine.stats), Dashboard("tiny", engine.stats)

    def add(self, request: Request) -> int:
        request_id = self.engine.add(request)
        for observer in (self.metrics, self.dashboard):
            observer.arrived(request_id, request)
        return request_id

    def step(self) -> list[Output]:
        outputs = self.engine.step()
        for observer in (self.metrics, self.dashboard):
            observer.stepped(outputs, self.engine.stats, time.monotonic())
        return outputs

    def finish(self) -> list[Output]:
        outputs = []
        while self.engine.has_work:
            outputs += self.step()
        return outputs


def test_counts_are_those_of_the_requests() -> None:
    watched = Watched(Engine(FakeModel(), EngineConfig(max_batch=2, token_budget=32)))
    metrics, dashboard = watched.metrics, watched.dashboard
    assert parsed(metrics)["vllm:num_requests_running", ()] == 0
    for start in (0, 20, 40, 60):
        watched.add(Request(range(start, start + 9), GREEDY))
    watched.step()
    now = parsed(metrics)
    assert (now["vllm:num_requests_running", ()], now["vllm:num_requests_waiting", ()]) == (2, 2)
    # Two prompts of 9 tokens fill 3 blocks of 4 tokens each; there are 64 blocks.
    assert now["vllm:kv_cache_usage_perc", ()] == 6 / 64
    assert now["vllm:cache_config_info", (("block_size", "4"), ("num_gpu_blocks", "64"))] == 1
    # Two prompts, and the first output token of each.
    assert now["vllm:iteration_tokens_total_sum", ()] == 2 * 10
    state = dashboard.snapshot()
    assert (state["running"], state["waiting"], state["kv_usage"], state["served"]) == (2, 2, 6 / 64, 0)
    watched.engine.cancel(3)
    watched.finish()
    again = watched.add(Request(range(9), GREEDY))
    assert watched.finish()[-1].request_id == again
    now = parsed(metrics)
    reason = "vllm:request_success_total"
    ended = {dict(labels)["finished_reason"]: value for (name, labels), value in now.items() if name == reason}
    assert ended == {"stop": 0, "length": 4, "abort": 1, "error": 0}
    assert now["vllm:prompt_tokens_total", ()] == 4 * 9
    assert now["vllm:generation_tokens_total", ()] == 4 * 12
    # The request that was cancelled was never looked up; the last one finds two full blocks.
    assert (now["vllm:prefix_cache_queries_total", ()], now["vllm:prefix_cache_hits_total", ()]) == (36, 8)
    assert now["vllm:prompt_tokens_cached_total", ()] == 8
    for name, count in {
        "time_to_first_token_seconds": 4,
        "inter_token_latency_seconds": 4 * 11,
        "request_time_per_output_token_seconds": 4,
        "e2e_request_latency_seconds": 4,
        "request_queue_time_seconds": 4,
        "request_inference_time_seconds": 4,
        "request_prefill_time_seconds": 4,
        "request_decode_time_seconds": 4,
        "request_prompt_tokens": 4,
        "request_generation_tokens": 4,
        "request_prefill_kv_computed_tokens": 4,
        "request_params_n": 5,
        "request_params_max_tokens": 5,
        "request_max_num_generation_tokens": 5,
    }.items():
        assert now[f"vllm:{name}_count", ()] == count
        assert now[f"vllm:{name}_bucket", (("le", "+Inf"),)] == count
    assert now["vllm:request_generation_tokens_sum", ()] == 48
    assert now["vllm:request_prefill_kv_computed_tokens_sum", ()] == 36 - 8
    assert now["vllm:iteration_tokens_total_sum", ()] == 36 - 8 + 48
    assert not any("spec_decode" in name for name, _ in now)
    # The sums agree: the time of a request is the time to its first token plus the gaps after it.
    parts = now["vllm:time_to_first_token_seconds_sum", ()] + now["vllm:inter_token_latency_seconds_sum", ()]
    # Outputs are timed within the step, gaps after it; a step of this model takes far less than the tolerance.
    whole = now["vllm:e2e_request_latency_seconds_sum", ()]
    assert parts == pytest.approx(whole, abs=0.5)
    queued, ran, prefill, decode = (
        now[f"vllm:request_{part}_time_seconds_sum", ()] for part in ("queue", "inference", "prefill", "decode")
    )
    assert queued + ran == pytest.approx(whole)
    assert prefill + decode == pytest.approx(ran)
    assert min(queued, prefill, decode) > 0
    state = dashboard.snapshot()
    assert (state["served"], state["running"], state["acceptance_rate"]) == (4, 0, None)
    assert state["prefix_hit_rate"] == 8 / 36


def test_buckets_are_vllms() -> None:
    model = FakeModel()
    model.max_model_len = 1000
    metrics = PrometheusMetrics("tiny", model, Engine(model).stats)
    buckets: dict[str, list[float]] = {}
    for name, labels in parsed(metrics):
        if name.endswith("_bucket"):
            buckets.setdefault(name, []).append(float(dict(labels)["le"]))
    infinite = (float("inf"),)
    lengths = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert {name: tuple(values) for name, values in buckets.items()} == {
        "vllm:time_to_first_token_seconds_bucket": TTFT_BUCKETS + infinite,
        "vllm:inter_token_latency_seconds_bucket": TOKEN_BUCKETS + infinite,
        "vllm:request_time_per_output_token_seconds_bucket": TOKEN_BUCKETS + infinite,
        "vllm:e2e_request_latency_seconds_bucket": REQUEST_BUCKETS + infinite,
        "vllm:request_queue_time_seconds_bucket": REQUEST_BUCKETS + infinite,
        "vllm:request_inference_time_seconds_bucket": REQUEST_BUCKETS + infinite,
        "vllm:request_prefill_time_seconds_bucket": REQUEST_BUCKETS + infinite,
        "vllm:request_decode_time_seconds_bucket": REQUEST_BUCKETS + infinite,
        "vllm:request_prompt_tokens_bucket": lengths + infinite,
        "vllm:request_generation_tokens_bucket": lengths + infinite,
        "vllm:request_prefill_kv_computed_tokens_bucket": lengths + infinite,
        "vllm:request_max_num_generation_tokens_bucket": lengths + infinite,
        "vllm:request_params_max_tokens_bucket": lengths + infinite,
        "vllm:request_params_n_bucket": N_BUCKETS + infinite,
        "vllm:iteration_tokens_total_bucket": STEP_BUCKETS + infinite,
    }


def test_samples_share_a_prompt_and_failures_count_as_such() -> None:
    model = FakeModel()
    watched = Watched(Engine(model))
    metrics, dashboard = watched.metrics, watched.dashboard
    watched.add(Request([1, 2, 3], SamplingParams(n=3, seed=1, max_tokens=5)))
    watched.finish()
    model.fail = 50
    watched.add(Request([50], GREEDY))
    (failed,) = watched.step()
    assert failed.error is not None
    metrics.refused("busy")
    now = parsed(metrics)
    assert now["vllm:prompt_tokens_total", ()] == 3
    assert now["vllm:generation_tokens_total", ()] == 15
    assert (now["vllm:request_params_n_sum", ()], now["vllm:request_params_n_count", ()]) == (3 + 1, 2)
    assert now["vllm:request_max_num_generation_tokens_sum", ()] == 5
    assert now["vllm:request_success_total", (("finished_reason", "length"),)] == 3
    assert now["vllm:request_success_total", (("finished_reason", "error"),)] == 1
    assert now["vllm:e2e_request_latency_seconds_count", ()] == 3
    assert now["quantkit:requests_refused_total", (("reason", "busy"),)] == 1
    assert dashboard.snapshot()["served"] == 3


class HalfRight(NgramProposer):
    """Drafts the tokens that the model will choose, and a wrong one at the end."""

    def propose(self, wanted: abc.Sequence[tuple[Sequence, int]]) -> list[Draft]:
        """See `Proposer`."""
        drafts = [expected(list(sequence.tokens), count) for sequence, count in wanted]
        return [Draft([*tokens[:-1], (tokens[-1] + 1) % VOCAB]) for tokens in drafts]


def test_preemptions_and_drafts() -> None:
    engine = Engine(FakeModel(16), EngineConfig(max_batch=4, token_budget=32, draft_len=3), proposer=HalfRight())
    watched = Watched(engine)
    for start in (0, 10, 20):
        watched.add(Request([start, start + 1] * 5, SamplingParams(temperature=0, max_tokens=30)))
    watched.finish()
    stats, now = engine.stats, parsed(watched.metrics)
    assert stats.speculation is not None
    assert 0 < now["vllm:num_preemptions_total", ()] == stats.preemptions
    assert 0 < now["vllm:spec_decode_num_drafts_total", ()] == stats.speculation.drafts
    assert now["vllm:spec_decode_num_draft_tokens_total", ()] == stats.speculation.drafted
    assert now["vllm:spec_decode_num_accepted_tokens_total", ()] == stats.speculation.accepted
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    by_position = [now[name, (("position", str(i)),)] for i in range(len(stats.speculation.accepted_by_position))]
    assert sum(by_position) == stats.speculation.accepted
    assert watched.dashboard.snapshot()["acceptance_rate"] == stats.speculation.acceptance_rate
    # A preempted request's prompt is computed twice and counts once.
    assert now["vllm:prompt_tokens_total", ()] == 30


def test_times_are_what_the_formulas_say() -> None:
    model = FakeModel()
    stats: EngineStats = Engine(model).stats
    metrics, dashboard = PrometheusMetrics("tiny", model, stats), Dashboard("tiny", stats)
    first = Output(0, 0, Usage(4, 0, 1), Timing(10.0, 10.125, 10.5), token_ids=[1])
    middle = Output(0, 0, Usage(4, 0, 3), Timing(10.0, 10.125, 10.5), token_ids=[2, 3])
    last = Output(0, 0, Usage(4, 0, 5), Timing(10.0, 10.125, 10.5, 12.5), token_ids=[4, 5], finish_reason=End.STOP)
    for observer in (metrics, dashboard):
        observer.arrived(0, Request(range(4)))
        for output, at in ((first, 10.5), (middle, 11.5), (last, 12.5)):
            observer.stepped([output], stats, at)
    now = parsed(metrics)
    assert now["vllm:time_to_first_token_seconds_sum", ()] == 0.5
    # Two chunks after the first, one second apart; and four tokens after the first in two seconds.
    assert (now["vllm:inter_token_latency_seconds_count", ()], now["vllm:inter_token_latency_seconds_sum", ()]) == (2, 2.0)
    assert now["vllm:request_time_per_output_token_seconds_sum", ()] == 0.5
    assert now["vllm:e2e_request_latency_seconds_sum", ()] == 2.5
    parts = {"queue": 0.125, "inference": 2.375, "prefill": 0.375, "decode": 2.0}
    assert {part: now[f"vllm:request_{part}_time_seconds_sum", ()] for part in parts} == parts
    state = dashboard.snapshot(12.5)
    assert state["tokens_per_second"] == 5 / WINDOW
    assert state["ttft_seconds"] == {"p50": 0.5, "p90": 0.5, "p99": 0.5}
    assert dashboard.snapshot(11.0 + WINDOW)["tokens_per_second"] == 4 / WINDOW
    assert dashboard.snapshot(13.0 + WINDOW)["tokens_per_second"] == 0


def test_percentiles() -> None:
    assert percentiles([]) is None
    assert percentiles([2.0]) == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    hundred = percentiles([float(i) for i in range(101)])
    assert hundred == pytest.approx({"p50": 50, "p90": 90, "p99": 99})
