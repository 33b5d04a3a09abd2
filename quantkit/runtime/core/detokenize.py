"""Text from tokens as they come: never half a character, never a part of a stop string.

Tokens cannot be decoded one by one: a character may span several, and some tokenizers drop the space of the first one. So a
window of the last tokens is decoded again each time and what it has more than before is the new text. A window starts where
the text was whole and keeps some tokens of context.
"""

from collections.abc import Callable, Sequence

#: Token ids to text.
Decode = Callable[[list[int]], str]

#: What decoders put in place of bytes that are no character (yet).
_BROKEN = "\ufffd"

#: Bytes of an incomplete character at most, hence the characters that may still change.
_PARTIAL = 3

#: So many tokens hold any one character; when that many come without a whole one, the bytes are broken for good.
_PATIENCE = 8

#: Tokens of context that a window keeps, and tokens at which it is cut.
_KEPT, _LONGEST = 4, 10


class Detokenizer:
    """The text of one sequence. The texts returned by `push` and `flush` add up to the text of all tokens pushed."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        """
        Args:
            decode: token ids to text; skips special tokens if these are not to be seen.
            prompt: what the tokens continue; its end is the first window's context.
        """
        self._decode = decode
        self._window = _context(decode, prompt)
        text = decode(self._window)
        # What the prompt's end leaves incomplete belongs to the new text.
        self._emitted = len(text) - min(_broken(text), _PARTIAL)
        self._held = 0
        self._cut = 0

    def push(self, token: int) -> str:
        """The text that is certain with one more token."""
        self._window.append(token)
        text = self._decode(self._window)
        broken = _broken(text)
        self._held = self._held + 1 if broken else 0
        if 0 < self._held < _PATIENCE:
            return ""
        stable = max(self._emitted, len(text) - min(broken, _PARTIAL))
        new, self._emitted = text[self._emitted : stable], stable
        if not broken:
            self._shorten()
        return new

    def flush(self) -> str:
        """What was held back, incomplete as it is; nothing comes after it."""
        return self._decode(self._window)[self._emitted :]

    def _shorten(self) -> None:
        """Cut a long window where the text was whole some tokens ago."""
        if len(self._window) >= _LONGEST and self._cut:
            self._window = self._window[self._cut :]
            self._emitted, self._cut = len(self._decode(self._window)), 0
        elif len(self._window) >= _KEPT and not self._cut:
            self._cut = len(self._window)


def _broken(text: str) -> int:
    """Characters at the end of `text` that are none."""
    return len(text) - len(text.rstrip(_BROKEN))


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The prompt's last tokens, from the start of a character."""
    windows = [list(prompt[-size:]) for size in range(_KEPT, _KEPT + _PARTIAL + 1)]
    return next((window for window in windows if not decode(window).startswith(_BROKEN)), windows[0])


class StopStrings:
    """Finds stop strings in text that comes in pieces; the result does not depend on how it was cut.

    The string that is complete first ends the text, the longest one of those that end together.

    Attributes:
        found: the stop string, once there is one.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that is certainly not part of a stop string; the last there is once `found` is set."""
        if not self._stops or not text:
            return text
        text = self._held + text
        ends = [(start + len(stop), stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, self.found = min(ends, key=lambda found: found[0])
            self._held = ""
            return text[: end if self._include else end - len(self.found)]
        start = len(text) - self._longest_start(text)
        self._held = text[start:]
        return text[:start]

    def flush(self) -> str:
        """What was held back, now that nothing follows it."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string starts with."""
        longest = min(len(text), len(self._stops[0]) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class TextStream:
    """Tokens in, finished text out.

    Attributes:
        stop: the stop string that ended the text, if one did.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stops: Sequence[str], include_stop: bool) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = StopStrings(stops, include_stop)

    @property
    def stop(self) -> str | None:
        """See the class."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Text that can be shown."""
        return self._stops.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """The rest, when the sequence ends for another reason than a stop string."""
        rest = self._stops.push(self._detokenizer.flush())
        return rest if self.stop is not None else rest + self._stops.flush()
