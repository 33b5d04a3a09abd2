"""Latencies of one sample in seconds, defined as the field does, computed from the timestamps in `Output.timing`."""

from quantkit.runtime.core.output import FinishReason, Output


def is_first(output: Output) -> bool:
    """Whether it brings the sample's first token."""
    return 0 < len(output.token_ids) == output.usage.generated


def is_completed(output: Output) -> bool:
    """Whether it ends the sample as the request asked: not cancelled, no error."""
    return output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def ttft(output: Output) -> float:
    """Time to first token: first token - arrival. `output`: one with a first token."""
    return _span(output.timing.arrival, output.timing.first_token)


def e2e(output: Output) -> float:
    """End - arrival. `output`, here and below: the last one of a completed sample, so that all its times are known."""
    return _span(output.timing.arrival, output.timing.finished)


def queued(output: Output) -> float:
    """First scheduled - arrival: how long the request waited."""
    return _span(output.timing.arrival, output.timing.scheduled)


def inference(output: Output) -> float:
    """End - first scheduled: how long the sample ran, including the time during which it was preempted."""
    return _span(output.timing.scheduled, output.timing.finished)


def prefill(output: Output) -> float:
    """First token - first scheduled."""
    return _span(output.timing.scheduled, output.timing.first_token)


def decode(output: Output) -> float:
    """End - first token."""
    return _span(output.timing.first_token, output.timing.finished)


def tpot(output: Output) -> float | None:
    """Time per output token: (end - first token) / (n - 1); None for fewer than two tokens."""
    count = output.usage.generated
    return decode(output) / (count - 1) if count > 1 else None


def _span(start: float | None, end: float | None) -> float:
    assert start is not None
    assert end is not None
    return end - start
