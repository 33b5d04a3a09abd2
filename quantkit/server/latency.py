"""Times of one sample, as the field defines them, in seconds; `Timing` says when things happened."""

from quantkit.runtime.sequence import FinishReason, Output


def is_first(output: Output) -> bool:
    """Whether it brings the sample's first token."""
    return 0 < len(output.token_ids) == output.usage.generated


def is_served(output: Output) -> bool:
    """Whether it ends the sample, and as the request wanted."""
    return output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


def ttft(output: Output) -> float:
    """Time to first token: first token - arrival. `output`: there was a first token."""
    assert output.timing.first_token is not None
    return output.timing.first_token - output.timing.arrival


def tpot(output: Output) -> float | None:
    """Time per output token: (end - first token) / (n - 1); None for fewer than two tokens. `output`: the last one."""
    timing, count = output.timing, output.usage.generated
    if timing.first_token is None or timing.finished is None or count < 2:
        return None
    return (timing.finished - timing.first_token) / (count - 1)
