"""OpenAI response objects from engine outputs: one builder for completions, one for chat completions."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from quantkit.runtime.core.output import Output, TokenLogprobs

#: Decodes token ids to text.
Text = Callable[[Sequence[int]], str]


class Echo(NamedTuple):
    """A prompt that is repeated before its output: its text (None if it was sent as tokens) and its tokens."""

    text: str | None
    tokens: Sequence[int]


class ResponseBuilder(Protocol):
    """Builds the JSON of one response. A choice is one sample; choices are numbered over all prompts of the call."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The chunk that opens a choice in a stream, before its first token; None: no such chunk."""

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """One chunk of a choice in a stream."""

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        """A complete choice."""

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """The response object around choices, or around their chunks."""


class _Envelope:
    """Id, type and creation time of a response's objects."""

    prefix, name, chunk_name = "", "", ""

    def __init__(self, model: str, text: Text) -> None:
        self._model, self._text = model, text
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """See `ResponseBuilder`."""
        name = self.chunk_name if chunk else self.name
        return {"id": self._id, "object": name, "created": self._created, "model": self._model, "choices": list(choices)}

    def _piece(self, token: int) -> str:
        return self._text([token])


class CompletionResponseBuilder(_Envelope):
    """`text_completion` objects."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, text: Text, echoes: Sequence[Echo] = ()) -> None:
        """
        Args:
            model: the model's name.
            text: decodes token ids.
            echoes: the prompt of each choice, where prompts are to be repeated before outputs.
        """
        super().__init__(model, text)
        #: Choice -> prompt that has not been echoed yet.
        self._echoes = dict(enumerate(echoes))
        #: Choice -> characters of its tokens so far.
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `ResponseBuilder`: there is none."""
        return None

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """See `ResponseBuilder`."""
        text, logprobs = output.text, None
        if (echo := self._echoes.pop(index, None)) is not None:
            text = (self._text(echo.tokens) if echo.text is None else echo.text) + text
        if output.logprobs:
            first = None if echo is None else echo.tokens[0]
            logprobs = self._logprobs(index, [*output.prompt_logprobs, *output.logprobs], first)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": _reason(output)}

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        """See `ResponseBuilder`."""
        return self.delta(index, output)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs], first: int | None) -> dict[str, Any]:
        """OpenAI's parallel lists. Where several tokens have the same text, `top_logprobs` keeps the most likely one.

        `first` is the prompt's first token, which has no log probability because nothing precedes it.
        """
        offsets, end = [], self._offsets.get(index, 0)
        head = [] if first is None else [first]
        unscored = [None] * len(head)
        pieces = [self._piece(token) for token in (*head, *(entry.token for entry in entries))]
        for piece in pieces:
            offsets.append(end)
            end += len(piece)
        self._offsets[index] = end
        tops: list[dict[str, float]] = []
        for entry, piece in zip(entries, pieces[len(head) :], strict=True):
            best: dict[str, float] = {}
            for token, logprob in entry.top:
                best.setdefault(self._piece(token), logprob)
            best.setdefault(piece, entry.logprob)
            tops.append(best)
        chosen = [*unscored, *(entry.logprob for entry in entries)]
        return {"tokens": pieces, "token_logprobs": chosen, "top_logprobs": [*unscored, *tops], "text_offset": offsets}


class ChatResponseBuilder(_Envelope):
    """`chat.completion` objects and their chunks."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `ResponseBuilder`: the role."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """See `ResponseBuilder`."""
        delta = {"content": output.text} if output.text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(output), "finish_reason": _reason(output)}

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        """See `ResponseBuilder`."""
        message = {"role": "assistant", "content": output.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(output), "finish_reason": _reason(output)}

    def _logprobs(self, output: Output) -> dict[str, Any] | None:
        if not output.logprobs:
            return None
        content = [
            self._one(entry.token, entry.logprob) | {"top_logprobs": [self._one(*top) for top in entry.top]}
            for entry in output.logprobs
        ]
        return {"content": content, "refusal": None}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        """A token with its log probability. `bytes` is None for a token that holds only part of a character."""
        piece = self._piece(token)
        return {"token": piece, "logprob": logprob, "bytes": None if "\ufffd" in piece else list(piece.encode())}


def _reason(output: Output) -> str | None:
    return None if output.finish_reason is None else output.finish_reason.value
