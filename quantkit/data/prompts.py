"""Prompts from a file: a .txt with one a line, or a .jsonl with an object a line; each keeps where it stands."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from quantkit.errors import RequestError

#: A prompt as text, or as chat messages (`role`, `content`).
Prompt = str | Sequence[Mapping[str, str]]


class LocatedPrompt(NamedTuple):
    """A prompt and where it stands, as "p.txt, line 3"; nowhere when it comes from the command line."""

    prompt: Prompt
    where: str = ""

    def with_location(self, message: object) -> str:
        """A message about the prompt."""
        return f"{self.where}: {message}" if self.where else str(message)

    @contextmanager
    def located_errors(self) -> Iterator[None]:
        """Inside, errors of requests say where the prompt stands."""
        try:
            yield
        except RequestError as error:
            raise RequestError(self.with_location(error)) from error


def read_prompts(path: Path) -> list[LocatedPrompt]:
    """Prompts from a file: a line each, or, in a .jsonl, the `prompt` or the `messages` of each object. Blank lines are none.

    Raises:
        RequestError: the file is missing, of another kind, not UTF-8 or empty, or a line holds no prompt.
    """
    kind = path.suffix.lower()
    if kind not in ("", ".txt", ".jsonl"):
        raise RequestError(f"{path}: {kind} files are not read; name a .txt or .jsonl file of prompts")
    try:
        # Only at "\n": str.splitlines also cuts at U+2028, U+0085 and others, which may stand in a prompt.
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
        raise RequestError(f"{path}: holds no prompt; write one a line")
    return [LocatedPrompt(_from_json(str(line), where), where) for line, where in found] if kind == ".jsonl" else found


def _from_json(line: str, where: str) -> Prompt:
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
