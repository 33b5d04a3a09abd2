"""A client of an OpenAI-compatible server that notes when each piece of a stream came.

Prompts are token ids, so that they have exactly as many tokens as they should with any tokenizer. They are drawn from the
first 256, which every vocabulary has, and differ from their first tokens on, so that no prefix cache helps.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from quantkit.bench.measures import Record
from quantkit.errors import QuantkitError

#: Seconds to connect.
_CONNECT = 10.0


class BrokenReplyError(Exception):
    """A reply that is not what OpenAI's protocol has, or that says that the request failed."""


@dataclass(frozen=True)
class Workload:
    """What every request asks for.

    Attributes:
        prompt_tokens: length of the prompt.
        max_tokens: length of the output, at most.
        ignore_eos: go on to `max_tokens` whatever the model would do; vLLM's and SGLang's servers know that, too.
        seed: of the prompts.
        timeout: seconds after which a request has failed.
    """

    prompt_tokens: int = 128
    max_tokens: int = 64
    ignore_eos: bool = True
    seed: int = 0
    timeout: float = 600.0

    def prompt(self, number: int) -> list[int]:
        """Token ids of a request's prompt; the same for the same seed and number."""
        return Random(f"{self.seed}:{number}").choices(range(3, 256), k=self.prompt_tokens)

    def body(self, model: str, number: int) -> dict[str, Any]:
        """A request to `/v1/completions`. Greedy, so that two runs do the same work."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        extra = {"ignore_eos": True} if self.ignore_eos else {}
        lengths = {"prompt": self.prompt(number), "max_tokens": self.max_tokens}
        return {"model": model, "temperature": 0} | lengths | stream | extra


class Client:
    """Sends one workload's requests to one server. An async context manager."""

    def __init__(
        self, url: str, workload: Workload, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """
        Args:
            url: of the server, with or without `/v1`.
            workload: what to ask for.
            api_key: sent as a bearer token.
            transport: how to reach the server; None: by network.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self._workload = workload
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(None, connect=_CONNECT),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def connect(self, model: str | None) -> str:
        """Find the model, and see that one request of the workload, which is not measured, is answered as it should be.

        Args:
            model: a name that the server knows; None: its first.

        Returns:
            The model's name.

        Raises:
            QuantkitError: the server cannot be reached, or does not serve this.
        """
        try:
            name = model or await self._first_model()
        except (httpx.HTTPError, httpx.InvalidURL, BrokenReplyError) as error:
            raise QuantkitError(
                f"{self.url}: lists no models ({_reason(error)}); is this an OpenAI-compatible server?"
            ) from None
        record = await self.send(name, -1, asyncio.get_running_loop().time())
        if record.error is not None:
            raise QuantkitError(f"{self.url}: a first request to {name} failed ({record.error}); no load was put on it")
        return name

    async def send(self, model: str, number: int, arrival: float) -> Record:
        """Run one request to its end, of whatever kind; nothing is raised.

        Args:
            model: the model's name.
            number: which prompt.
            arrival: when it was due, on the event loop's clock.
        """
        clock, chunks, usage = asyncio.get_running_loop().time, list[float](), dict[str, int]()
        try:
            end = await asyncio.wait_for(self._stream(model, number, chunks, usage), self._workload.timeout)
            prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
        except asyncio.TimeoutError:
            return Record(arrival, clock(), tuple(chunks), error=f"no end within {self._workload.timeout:g} s")
        except (httpx.HTTPError, BrokenReplyError, ValueError, TypeError, LookupError, AttributeError) as error:
            return Record(arrival, clock(), tuple(chunks), error=_reason(error))
        return Record(arrival, end, tuple(chunks), prompt, output)

    async def _stream(self, model: str, number: int, chunks: list[float], usage: dict[str, int]) -> float:
        """Note when text comes, and the numbers of tokens; when the text ended."""
        clock, end = asyncio.get_running_loop().time, None
        async with self._http.stream("POST", "/v1/completions", json=self._workload.body(model, number)) as response:
            await _require_success(response)
            async with aclosing(_events(response)) as events:
                async for event in events:
                    if event.get("error"):
                        raise BrokenReplyError(f"in the stream: {_message(event)}")
                    for choice in event.get("choices") or ():
                        if choice.get("text"):
                            chunks.append(clock())
                        if choice.get("finish_reason") is not None:
                            end = clock()
                    usage.update(event.get("usage") or {})
        if end is None:
            raise BrokenReplyError("the stream broke off")
        if not usage:
            raise BrokenReplyError("the stream does not say how many tokens it had (stream_options.include_usage)")
        return end

    async def _first_model(self) -> str:
        response = await self._http.get("/v1/models")
        await _require_success(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise BrokenReplyError("/v1/models is no list of models") from None


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects of a stream of server-sent events, up to its `[DONE]`."""
    async for line in response.aiter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


async def _require_success(response: httpx.Response) -> None:
    if response.is_error:
        body = await response.aread()
        try:
            message = _message(json.loads(body))
        except (ValueError, AttributeError):
            message = body.decode(errors="replace")
        raise BrokenReplyError(f"status {response.status_code}: {message}")


def _message(body: dict[str, Any]) -> str:
    """What an error's body says, in any of the shapes that servers give it."""
    error = body.get("error") or body.get("detail") or body.get("message")
    return str(error.get("message") if isinstance(error, dict) else error)


def _reason(error: Exception) -> str:
    """One short line, the same for errors of the same cause."""
    text = " ".join(str(error).split())[:160]
    return text if isinstance(error, BrokenReplyError) else f"{type(error).__name__}{text and ': ' + text}"
