"""Read prompts from a .txt file with one prompt per line, or a .jsonl file with one JSON object per line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from quantkit.errors import RequestError

#: A prompt: a text, or a list of chat messages with `role` and `content`.
Prompt = str | Sequence[Mapping[str, str]]


class LocatedPrompt(NamedTuple):
    """A prompt and its location, for example "p.txt, line 3"; the location is empty if it comes from the command line."""

    prompt: Prompt
    where: str = ""

    def with_location(self, message: object) -> str:
        """A message about the prompt, preceded by its location."""
        return f"{self.where}: {message}" if self.where else str(message)

    @contextmanager
    def located_errors(self) -> Iterator[None]:
        """Within the context, a `RequestError` gets the prompt's location."""
        try:
            yield
        except RequestError as error:
            raise RequestError(self.with_location(error)) from error


def read_prompts(path: Path) -> list[LocatedPrompt]:
    """The prompts of a file: its lines or, in a .jsonl file, each object's `prompt` or `messages`. Blank lines are skipped.

    Raises:
        RequestError: the file is missing, not UTF-8, empty or of another type, or a line holds no prompt.
    """
    kind = path.suffix.lower()
    if kind not in ("", ".txt", ".jsonl"):
        raise RequestError(f"{path}: {kind} files are not supported; name a .txt or .jsonl file of prompts")
    try:
        # Split at "\n" only: str.splitlines also splits at U+2028, U+0085 and others, which a prompt may contain.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise RequestError(f"{path}: cannot be read ({reason}); name a .txt or .jsonl file of prompts") from None
    found = [
        LocatedPrompt(line.removesuffix("\r"), f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not found:
        raise RequestError(f"{path}: holds no prompt; write one per line")
    return [LocatedPrompt(_from_json(str(line), where), where) for line, where in found] if kind == ".jsonl" else found


def _from_json(line: str, where: str) -> Prompt:
    """The prompt in a line of a .jsonl file.

    Raises:
        RequestError: the line is not JSON, or holds no prompt.
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: is not JSON ({error})") from None
    prompt, messages = (row.get("prompt"), row.get("messages")) if isinstance(row, dict) else (None, None)
    if prompt is not None and messages is not None:
        raise RequestError(f'{where}: has both a "prompt" and "messages"; leave one of them out')
    found = messages if prompt is None else prompt
    if found in ("", []):
        raise RequestError(f"{where}: the prompt is empty; write one, or leave the line out")
    if not isinstance(found, str) and not _are_messages(found):
        raise RequestError(f'{where}: has neither a "prompt" (text) nor "messages" (a list of role and content)')
    return cast(Prompt, found)


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
