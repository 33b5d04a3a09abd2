"""The postprocess phase of a step: append the chosen tokens, turn them into text, and detect the end of a sequence."""

from collections.abc import Iterable

from quantkit.errors import RequestError
from quantkit.runtime.core.output import FinishReason, Output, Timing, TokenLogprobs, Usage
from quantkit.runtime.core.sequence import Sample, Sequence


def postprocess(sequence: Sequence, samples: Iterable[Sample], now: float) -> Output:
    """Append tokens to a sequence, up to the first one that ends it.

    Args:
        sequence: one that has not ended.
        samples: its next tokens, at least one.
        now: when they were chosen.

    Returns:
        What the tokens add. If it has a finish reason, the sequence has ended, and the caller frees what it holds. If the
        constraint could not compute a mask, the tokens were chosen without it: they are dropped, and the sequence ends with
        a `RequestError`.
    """
    if sequence.constraint is not None and sequence.constraint.error is not None:
        error = RequestError(f"the text cannot be constrained any further ({sequence.constraint.error}); ask for less")
        return final_output(sequence, FinishReason.ERROR, now, error)
    shown = ""
    tokens: list[int] = []
    logprobs: list[TokenLogprobs] = []
    reason: FinishReason | None = None
    stop: str | int | None = None
    for token, token_logprobs in samples:
        sequence.tokens.append(token)
        if sequence.constraint is not None:
            sequence.constraint.advance(token)
        tokens.append(token)
        if token_logprobs is not None:
            logprobs.append(token_logprobs)
        text, reason, stop = _append_text(sequence, token)
        shown += text
        if reason is not None:
            break
    timing = sequence.timing
    finished = None if reason is None else now
    sequence.timing = timing._replace(first_token=timing.first_token or now, finished=finished)
    prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, []
    return Output(*_identity(sequence), shown, tokens, logprobs, reason, stop, prompt_logprobs=prompt_logprobs)


def final_output(sequence: Sequence, reason: FinishReason, now: float, error: Exception | None = None) -> Output:
    """The last output of a sequence that is cancelled or fails, with the text that was held back."""
    sequence.timing = sequence.timing._replace(finished=now)
    return Output(*_identity(sequence), sequence.text.flush(), finish_reason=reason, error=error)


def _identity(sequence: Sequence) -> tuple[int, int, Usage, Timing]:
    return sequence.request_id, sequence.index, sequence.usage, sequence.timing


def _append_text(sequence: Sequence, token: int) -> tuple[str, FinishReason | None, str | int | None]:
    """Returns the new text, the finish reason if `token` ends the sequence, and the stop token or string that ended it."""
    stream, params = sequence.text, sequence.params
    if token in sequence.stop_tokens:
        shown = stream.push(token) if params.include_stop else ""
        return shown + stream.flush(), FinishReason.STOP, token
    shown = stream.push(token)
    if stream.stop is not None:
        return shown, FinishReason.STOP, stream.stop
    if sequence.constraint is not None and sequence.constraint.finished:
        return shown + stream.flush(), FinishReason.STOP, None
    if len(sequence.tokens) < sequence.limit:
        return shown, None, None
    return shown + stream.flush(), FinishReason.LENGTH, None
