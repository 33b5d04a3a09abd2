"""Tokenization outside the event loop, so that a long prompt does not delay other streams."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

from quantkit.data.prompts import Prompt
from quantkit.runtime.core.constraint import Constraint
from quantkit.runtime.core.request import Request, SamplingParams
from quantkit.runtime.session import Session


class TokenizerWorker:
    """A session's tokenizer, used by the event loop, one worker thread and the engine's thread at the same time."""

    def __init__(self, session: Session) -> None:
        self._session, self._tokenizer = session, session.tokenizer
        if self._tokenizer.is_fast:
            # The first encoding would set these, and a fast tokenizer refuses to be changed while another thread decodes.
            self._tokenizer.backend_tokenizer.no_truncation()
            self._tokenizer.backend_tokenizer.no_padding()
        # One thread is enough: the tokenizer itself uses several cores.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    async def request(
        self, prompt: Prompt | list[int], params: SamplingParams, constraint: Constraint | None = None
    ) -> Request:
        """An engine request for a text, chat messages, or tokens; see `encode`."""
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            return Request(cast(list[int], prompt), params, constraint)
        return Request(await self.encode(cast(Prompt, prompt)), params, constraint)

    async def constraint(self, schema: Mapping[str, Any]) -> Constraint:
        """A constraint that makes outputs match a JSON schema.

        Raises:
            RequestError: the schema is refused, or llguidance is not installed.
        """
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._compile, schema)

    async def encode(self, prompt: Prompt) -> Sequence[int]:
        """The tokens of a text, or of chat messages.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages.
        """
        encode = partial(self._session.request, prompt, SamplingParams(), chat=False)
        return (await asyncio.get_running_loop().run_in_executor(self._worker, encode)).prompt

    async def decode(self, tokens: list[int]) -> str:
        """The text of tokens, special tokens included."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self.text, tokens)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special tokens included. Callable from any thread. Incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def close(self) -> None:
        """End the worker thread."""
        self._worker.shutdown(cancel_futures=True)

    def _compile(self, schema: Mapping[str, Any]) -> Constraint:
        return self._session.grammars.compile(schema)
