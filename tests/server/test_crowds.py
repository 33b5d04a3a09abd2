"""Many streams at once, some abandoned, some read slowly: no token is lost or repeated, no block is leaked."""

import asyncio
import json
import random
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.live_server import serving, tiny_folder, wait
from quantkit.server.app import ServerConfig

ASKED = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0}


async def _stream(client: httpx.AsyncClient, prompt: str, leave_after: int | None, pause: float) -> list[Any] | None:
    """The text and the tokens of one stream; None if it was abandoned."""
    text, tokens, events = "", list[str](), 0
    async with client.stream("POST", "/v1/completions", json={**ASKED, "prompt": prompt, "stream": True}) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
                tokens += choice["logprobs"]["tokens"]
                events += 1
                await asyncio.sleep(pause)
            if events == leave_after:
                return None
    return [text, tokens]


async def _crowd(url: str, count: int) -> None:
    chance = random.Random(count)
    prompts = [f"{number} times" for number in range(count)]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        whole = (await client.post("/v1/completions", json={**ASKED, "prompt": prompts})).json()["choices"]
        expected = [[choice["text"], choice["logprobs"]["tokens"]] for choice in whole]
        leaving = [chance.randint(1, 10) if chance.random() < 0.4 else None for _ in prompts]
        pauses = [0.01 if chance.random() < 0.3 else 0.0 for _ in prompts]
        found = await asyncio.gather(*(_stream(client, *each) for each in zip(prompts, leaving, pauses, strict=True)))
    assert all(len(tokens) == 24 for _, tokens in expected)
    wanted = [None if left else each for each, left in zip(expected, leaving, strict=True)]
    assert found == wanted
    assert 0 < found.count(None) < count


@pytest.mark.parametrize("spec", ["off", "ngram"])
@pytest.mark.parametrize("count", [16, 64])
def test_crowds(tmp_path: Path, count: int, spec: str) -> None:
    with serving(tiny_folder(tmp_path), ServerConfig("tiny", 16), spec) as (url, _):
        asyncio.run(_crowd(url, count))


def test_a_reader_who_stops_holds_nobody_up(tmp_path: Path) -> None:
    # Log probabilities make events so long that they fill the buffers between server and client.
    body = json.dumps({**ASKED, "prompt": "x", "logprobs": 20, "n": 8, "temperature": 1, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with (
        serving(tiny_folder(tmp_path), ServerConfig("tiny", 16, request_timeout=3)) as (url, endpoints),
        socket.socket() as unread,
    ):
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        unread.sendall(head.encode() + body)
        wait(lambda: not endpoints.engine_thread.idle)
        for number in range(3):
            reply = httpx.post(url + "/v1/completions", json={**ASKED, "prompt": f"{number}"}, timeout=60)
            assert len(reply.json()["choices"][0]["logprobs"]["tokens"]) == 24
        wait(lambda: not endpoints.session.engine.has_work)
        assert not endpoints.engine_thread.idle  # all is generated, and not all is sent
        wait(lambda: endpoints.engine_thread.idle)  # because its time limit has passed
