"""Per-sample histograms of `/metrics`, with the names and buckets of vLLM (vllm/v1/metrics)."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from quantkit.runtime.core import latency
from quantkit.runtime.core.output import Output

#: Buckets in seconds.
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
#: Buckets in tokens per step, and in samples per request.
STEP_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
N_BUCKETS = (1, 2, 5, 10, 20)


class SampleHistogram(NamedTuple):
    """A histogram that every sample adds to when it completes: not when it is cancelled or fails.

    Attributes:
        name: the metric's name without `vllm:`.
        text: its help text.
        buckets: upper bounds; None: those of `length_buckets`.
        of: the sample's last output -> value; None: this sample has no such value.
    """

    name: str
    text: str
    buckets: Sequence[float] | None
    of: Callable[[Output], float | None]


SAMPLE_HISTOGRAMS = (
    SampleHistogram("e2e_request_latency_seconds", "End - arrival.", REQUEST_BUCKETS, latency.e2e),
    SampleHistogram("request_queue_time_seconds", "First scheduled - arrival.", REQUEST_BUCKETS, latency.queued),
    SampleHistogram("request_inference_time_seconds", "End - first scheduled.", REQUEST_BUCKETS, latency.inference),
    SampleHistogram("request_prefill_time_seconds", "First token - first scheduled.", REQUEST_BUCKETS, latency.prefill),
    SampleHistogram("request_decode_time_seconds", "End - first token.", REQUEST_BUCKETS, latency.decode),
    SampleHistogram(
        "request_time_per_output_token_seconds", "(End - first token) / (tokens - 1).", TOKEN_BUCKETS, latency.tpot
    ),
    SampleHistogram("request_prompt_tokens", "Tokens in a prompt.", None, lambda output: output.usage.prompt),
    SampleHistogram("request_generation_tokens", "Tokens generated.", None, lambda output: output.usage.generated),
    SampleHistogram(
        "request_prefill_kv_computed_tokens",
        "Prompt tokens that were not in the prefix cache.",
        None,
        lambda output: output.usage.prompt - output.usage.cached,
    ),
)


def length_buckets(most: int) -> Iterator[int]:
    """1, 2, 5, 10, 20, 50 ... up to `most`, the length of the longest possible sequence."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale > most:
                return
            yield step * scale
        scale *= 10
