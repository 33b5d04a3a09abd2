"""A server with OpenAI's protocol that sends every token at a known time of the event loop's clock."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Stub(httpx.AsyncBaseTransport):
    """Answers every completion alike.

    Attributes:
        first, gap: seconds to the first token, and between two.
        texts: of the tokens; by default "x", as many as are asked for.
        faults: number of a completion, counting from the unmeasured first -> what happens instead.
        usage: whether a stream says how many tokens it had.
        key: what it asks for.
        bodies: what it was asked, in order.
        arrivals: when.
        most: completions at a time.
    """

    first: float = 1.0
    gap: float = 0.25
    texts: list[str] | None = None
    faults: dict[int, httpx.Response | Exception | str] = field(default_factory=dict)
    usage: bool = True
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx."""
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return httpx.Response(401, json={"error": {"message": "no valid key"}})
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"object": "list", "data": [{"id": "stub"}, {"id": "other"}]})
        assert request.url.path == "/v1/completions"
        number = len(self.bodies)
        self.bodies.append(json.loads(request.content))
        self.arrivals.append(asyncio.get_running_loop().time())
        fault = self.faults.get(number)
        if isinstance(fault, Exception):
            raise fault
        if isinstance(fault, httpx.Response):
            return fault
        return httpx.Response(200, stream=_Stream(self, self.bodies[-1], fault))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, stub: Stub, body: dict[str, Any], fault: str | None) -> None:
        self._stub, self._body, self._fault = stub, body, fault

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stub, count = self._stub, self._body["max_tokens"]
        stub.running += 1
        stub.most = max(stub.most, stub.running)
        texts = ["x"] * count if stub.texts is None else stub.texts
        for i, text in enumerate(texts):
            await asyncio.sleep(stub.gap if i else stub.first)
            if i == 1 and self._fault is not None:
                yield self._fault.encode()
                stub.running -= 1
                return
            yield _event({"choices": [{"index": 0, "text": text, "finish_reason": "length" if i == len(texts) - 1 else None}]})
        stub.running -= 1
        if stub.usage:
            yield _event(
                {"choices": [], "usage": {"prompt_tokens": len(self._body["prompt"]), "completion_tokens": len(texts)}}
            )
        yield b"data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()
