"""Incremental detokenization: text from tokens as they arrive, without incomplete characters and parts of stop strings.

Tokens cannot be decoded one by one: a character may span several of them, and some tokenizers drop the space before the first
token. So a window of the last tokens is decoded again for each new token, and the new text is what was added to its end. A
window starts at a place where the text had no incomplete character, and keeps some tokens of context.
"""

from collections.abc import Callable, Sequence

#: Turns token ids into text.
Decode = Callable[[list[int]], str]

#: The replacement character, which decoders emit for bytes that are not (yet) a character.
_BROKEN = "\ufffd"

#: Largest number of bytes of an incomplete character, and so of replacement characters that may still change.
_PARTIAL = 3

#: No character spans more tokens; if so many arrive without completing one, the bytes will never be valid.
_PATIENCE = 8

#: Tokens of context that a window keeps, and the length at which a window is cut.
_KEPT, _LONGEST = 4, 10


class Detokenizer:
    """Detokenizes one sequence. The texts that `push` and `flush` return concatenate to the text of all tokens."""

    def __init__(self, decode: Decode, prompt: Sequence[int]) -> None:
        """
        Args:
            decode: turns token ids into text; skips special tokens if users should not see them.
            prompt: the tokens before; its end is the context of the first window.
        """
        self._decode = decode
        self._window = _context(decode, prompt)
        text = decode(self._window)
        # An incomplete character at the end of the prompt belongs to the new text.
        self._emitted = len(text) - min(_broken(text), _PARTIAL)
        self._held = 0
        self._cut = 0

    def push(self, token: int) -> str:
        """Add a token; returns the new text that later tokens cannot change."""
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
        """The text that was held back, at the end of the sequence; it may contain an incomplete character."""
        return self._decode(self._window)[self._emitted :]

    def _shorten(self) -> None:
        """Cut a long window at an earlier place where the text had no incomplete character."""
        if len(self._window) >= _LONGEST and self._cut:
            self._window = self._window[self._cut :]
            self._emitted, self._cut = len(self._decode(self._window)), 0
        elif len(self._window) >= _KEPT and not self._cut:
            self._cut = len(self._window)


def _broken(text: str) -> int:
    """Number of replacement characters at the end of `text`."""
    return len(text) - len(text.rstrip(_BROKEN))


def _context(decode: Decode, prompt: Sequence[int]) -> list[int]:
    """The last tokens of the prompt, beginning with a whole character."""
    windows = [list(prompt[-size:]) for size in range(_KEPT, _KEPT + _PARTIAL + 1)]
    return next((window for window in windows if not decode(window).startswith(_BROKEN)), windows[0])


class StopStrings:
    """Finds stop strings in text that arrives in pieces. The result does not depend on where the text was cut.

    The stop string that is complete first ends the text; of several that end at the same place, the longest.

    Attributes:
        found: the stop string, once it was found.
    """

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add text; returns what is certainly not part of a stop string. Once `found` is set, that is the end of the text."""
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
        """The text that was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _longest_start(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = min(len(text), len(self._stops[0]) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


class TextStream:
    """Turns a sequence's tokens into text that can be shown: detokenizes and looks for stop strings.

    Attributes:
        stop: the stop string that ended the text; None if none did.
    """

    def __init__(self, decode: Decode, prompt: Sequence[int], stops: Sequence[str], include_stop: bool) -> None:
        self._detokenizer = Detokenizer(decode, prompt)
        self._stops = StopStrings(stops, include_stop)

    @property
    def stop(self) -> str | None:
        """See the class."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Add a token; returns the new text that can be shown."""
        return self._stops.push(self._detokenizer.push(token))

    def flush(self) -> str:
        """The rest of the text, if the sequence ends for another reason than a stop string."""
        rest = self._stops.push(self._detokenizer.flush())
        return rest if self.stop is not None else rest + self._stops.flush()
