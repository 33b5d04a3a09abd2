"""Text to tokens and back, outside of the event loop: a long prompt must not hold up other streams."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from quantkit.data.prompts import Prompt
from quantkit.runtime.core.constraint import Constraint
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.session import Session


class Texts:
    """A session's tokenizer, which the event loop, one worker thread and the engine's thread use side by side."""

    def __init__(self, session: Session) -> None:
        self._session, self._tokenizer = session, session.tokenizer
        if self._tokenizer.is_fast:
            # Otherwise the first encoding would change these, which a fast tokenizer refuses while another thread decodes.
            self._tokenizer.backend_tokenizer.no_truncation()
            self._tokenizer.backend_tokenizer.no_padding()
        # One thread: tokenizing is spread over cores by the tokenizer itself.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def request(
        self, prompt: Prompt | list[int], params: SamplingParams, constraint: Constraint | None = None
    ) -> Request:
        """The engine's request for a text, for chat messages, or for tokens; see `encode`."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return Request(cast(list[int], prompt), params, constraint)
        return Request(await self.encode(cast(Prompt, prompt)), params, constraint)

    async def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """What makes texts fit a JSON schema.

        Raises:
            RequestError: the schema is refused, or llguidance is not installed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._compile, schema)

    async def encode(self, prompt: Prompt) -> Sequence[int]:
        """Tokens of a text, or of chat messages.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages.
        """
        encode = partial(self._session.request, prompt, SamplingParams(), chat=False)
        return (await asyncio.get_running_loop().run_in_executor(self._worker, encode)).prompt

    async def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special ones included."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.text, tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones included, from any thread; parts of characters show as U+FFFD."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """End the worker."""
        self._worker.shutdown(cancel_futures=True)

    def _compile(self, schema: Mapping[str, Any]) -> Constraint:
        return self._session.grammars.compile(schema)
