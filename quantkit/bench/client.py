"""A client of an OpenAI-compatible server that records when each chunk of a stream arrives.

Prompts are token ids, so that they have the exact length with any tokenizer. The ids are below 256, which every vocabulary
has. Prompts differ from their first tokens on, so that no prefix cache helps.
"""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from random import Random
from typing import Any

import httpx

from quantkit.bench.measures import RequestRecord
from quantkit.errors import QuantkitError

#: Timeout for connecting, seconds.
_CONNECT_SECONDS = 10.0


class BrokenReplyError(Exception):
    """A reply that violates OpenAI's protocol, or that reports an error."""


@dataclass(frozen=True)
class Workload:
    """What every request asks for.

    Attributes:
        prompt_tokens: tokens in the prompt.
        max_tokens: most tokens in the output.
        ignore_eos: generate `max_tokens` tokens even if the model would stop earlier; vLLM and SGLang support this too.
        seed: determines the prompts.
        timeout: seconds after which a request counts as failed.
    """

    prompt_tokens: int = 128
    max_tokens: int = 64
    ignore_eos: bool = True
    seed: int = 0
    timeout: float = 600.0

    def prompt(self, number: int) -> list[int]:
        """Token ids of the prompt of request `number`; determined by it and the seed."""
        return Random(f"{self.seed}:{number}").choices(range(3, 256), k=self.prompt_tokens)

    def body(self, model: str, number: int) -> dict[str, Any]:
        """The body of a request to `/v1/completions`. Greedy, so that every run does the same work."""
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        extra = {"ignore_eos": True} if self.ignore_eos else {}
        lengths = {"prompt": self.prompt(number), "max_tokens": self.max_tokens}
        return {"model": model, "temperature": 0} | lengths | stream | extra


class Client:
    """Sends the requests of one workload to one server. An async context manager."""

    def __init__(
        self, url: str, workload: Workload, api_key: str | None = None, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """
        Args:
            url: the server's URL, with or without `/v1`.
            workload: what each request asks for.
            api_key: sent as a bearer token; None: no token is sent.
            transport: how to reach the server; None: over the network.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self._workload = workload
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers={} if api_key is None else {"Authorization": f"Bearer {api_key}"},
            timeout=httpx.Timeout(None, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
        )

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def connect(self, model: str | None) -> str:
        """Find the model, and check with one unmeasured request that the server can run the workload.

        Args:
            model: the model's name on the server; None: the first one that the server lists.

        Returns:
            The model's name.

        Raises:
            QuantkitError: the server cannot be reached, or the request fails.
        """
        try:
            name = model or await self._first_model()
        except (httpx.HTTPError, httpx.InvalidURL, BrokenReplyError) as error:
            raise QuantkitError(
                f"{self.url}: lists no models ({_reason(error)}); is this an OpenAI-compatible server?"
            ) from None
        record = await self.send(name, -1, asyncio.get_running_loop().time())
        if record.error is not None:
            raise QuantkitError(f"{self.url}: the first request to {name} failed ({record.error}); the benchmark was not run")
        return name

    async def send(self, model: str, number: int, arrival: float) -> RequestRecord:
        """Run one request until it completes or fails. Failures are recorded, not raised.

        Args:
            model: the model's name.
            number: selects the prompt.
            arrival: when the request was due, on the event loop's clock.
        """
        clock, chunks, usage = asyncio.get_running_loop().time, list[float](), dict[str, int]()
        try:
            end = await asyncio.wait_for(self._stream(model, number, chunks, usage), self._workload.timeout)
            prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
        except asyncio.TimeoutError:
            return RequestRecord(arrival, clock(), tuple(chunks), error=f"not complete within {self._workload.timeout:g} s")
        except (httpx.HTTPError, BrokenReplyError, ValueError, TypeError, LookupError, AttributeError) as error:
            return RequestRecord(arrival, clock(), tuple(chunks), error=_reason(error))
        return RequestRecord(arrival, end, tuple(chunks), prompt, output)

    async def _stream(self, model: str, number: int, chunks: list[float], usage: dict[str, int]) -> float:
        """Record in `chunks` when text arrives and in `usage` the token counts; returns when the text ended."""
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
            raise BrokenReplyError("the stream ended early")
        if not usage:
            raise BrokenReplyError("the stream reports no token counts (stream_options.include_usage)")
        return end

    async def _first_model(self) -> str:
        response = await self._http.get("/v1/models")
        await _require_success(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise BrokenReplyError("/v1/models returned no list of models") from None


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
    """The message in an error body, in any of the shapes that servers use."""
    error = body.get("error") or body.get("detail") or body.get("message")
    return str(error.get("message") if isinstance(error, dict) else error)


def _reason(error: Exception) -> str:
    """One short line that is equal for errors with the same cause."""
    text = " ".join(str(error).split())[:160]
    return text if isinstance(error, BrokenReplyError) else f"{type(error).__name__}{text and ': ' + text}"
