"""Outputs of the engine in OpenAI's shapes: one class for completions, one for chat completions."""

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from quantkit.runtime.core.output import Output, TokenLogprobs

#: The text of tokens.
Text = Callable[[Sequence[int]], str]


class Echo(NamedTuple):
    """A prompt that stands before its output: as it was sent, None where that was tokens; and its tokens."""

    text: str | None
    tokens: Sequence[int]


class Form(Protocol):
    """How one reply is written. A choice is a sample of the call, counted over all of its prompts."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its first token."""

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """A part of a choice in a stream."""

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        """A choice that is complete."""

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """Choices, or parts of them, as an object."""


class _Envelope:
    """Names and times of a reply's objects."""

    prefix, name, chunk_name = "", "", ""

    def __init__(self, model: str, text: Text) -> None:
        self._model, self._text = model, text
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def envelope(self, choices: Sequence[dict[str, Any]], *, chunk: bool) -> dict[str, Any]:
        """See `Form`."""
        name = self.chunk_name if chunk else self.name
        return {"id": self._id, "object": name, "created": self._created, "model": self._model, "choices": list(choices)}

    def _piece(self, token: int) -> str:
        return self._text([token])


class CompletionForm(_Envelope):
    """`text_completion` objects."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, text: Text, echoes: Sequence[Echo] = ()) -> None:
        """
        Args:
            model: its name.
            text: of tokens.
            echoes: the prompt of each choice, if it is to stand before the output.
        """
        super().__init__(model, text)
        #: What is still to be echoed, by choice.
        self._echoes = dict(enumerate(echoes))
        #: Characters of each choice's tokens so far.
        self._offsets: dict[int, int] = {}

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Form`: nothing."""
        return None

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """See `Form`."""
        text, logprobs = output.text, None
        if (echo := self._echoes.pop(index, None)) is not None:
            text = (self._text(echo.tokens) if echo.text is None else echo.text) + text
        if output.logprobs:
            first = None if echo is None else echo.tokens[0]
            logprobs = self._logprobs(index, [*output.prompt_logprobs, *output.logprobs], first)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": _reason(output)}

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        """See `Form`."""
        return self.delta(index, output)

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs], first: int | None) -> dict[str, Any]:
        """Parallel lists; of several tokens with the same text, `top_logprobs` has the likeliest.

        `first` is a prompt's first token, which follows nothing and has no log probability.
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


class ChatForm(_Envelope):
    """`chat.completion` objects and their chunks."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any] | None:
        """See `Form`: who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def delta(self, index: int, output: Output) -> dict[str, Any]:
        """See `Form`."""
        delta = {"content": output.text} if output.text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(output), "finish_reason": _reason(output)}

    def whole(self, index: int, output: Output) -> dict[str, Any]:
        """See `Form`."""
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
        """A token; of a part of a character the bytes are not known."""
        piece = self._piece(token)
        return {"token": piece, "logprob": logprob, "bytes": None if "\ufffd" in piece else list(piece.encode())}


def _reason(output: Output) -> str | None:
    return None if output.finish_reason is None else output.finish_reason.value
