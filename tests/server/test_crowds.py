"""Many streams at once, some of which are left, some read slowly: no token lost, none twice, no block leaked."""

import asyncio
import json
import random
from pathlib import Path

import httpx
import pytest
from live_server import serving, tiny_folder

from quantkit.server.app import ServerConfig


async def _stream(client: httpx.AsyncClient, prompt: str, leave_after: int | None, pause: float) -> str | None:
    """The text of one stream; None where it was left."""
    body = {"prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": True, "stream": True}
    text, events = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                events += 1
                await asyncio.sleep(pause)
            if events == leave_after:
                return None
    return text


async def _crowd(url: str, count: int) -> None:
    chance = random.Random(count)
    prompts = [f"{number} times" for number in range(count)]
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        alone = [await _stream(client, prompt, None, 0) for prompt in prompts[:8]]
        leaving = [chance.randint(1, 10) if chance.random() < 0.4 else None for _ in prompts]
        pauses = [0.01 if chance.random() < 0.3 else 0.0 for _ in prompts]
        calls = [_stream(client, *each) for each in zip(prompts, leaving, pauses, strict=True)]
        texts = await asyncio.gather(*calls)
    # A stream may end before its reader leaves.
    assert {left is not None for text, left in zip(texts, leaving, strict=True) if text is None} == {True}
    for text, expected in zip(texts, alone, strict=False):
        assert text is None or text == expected


@pytest.mark.parametrize("count", [16, 64])
def test_crowds(tmp_path: Path, count: int) -> None:
    with serving(tiny_folder(tmp_path), ServerConfig("tiny", 16)) as (url, _):
        asyncio.run(_crowd(url, count))
