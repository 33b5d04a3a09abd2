"""Memory of a server over time, under streams of random lengths, a third of which the client abandons in the middle.

Every line: minutes since the start, requests completed and abandoned so far, resident memory of the server (MB), share of the
KV cache in use. Memory grows until every block of the KV cache was used once; if it keeps growing, there is a leak. The last
line is for the idle server, which has no block in use.

usage: python -m benchmarks.soak [--model demo] [--minutes 2] [--concurrency 8] [--every 10] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import random
import re
import time
from pathlib import Path
from pydoc_data.topics import topics

import httpx

from benchmarks.machine import describe_machine
from quantkit.bench.child import serving

TEXT = " ".join(topics[name] for name in sorted(topics))


class Counts:
    """Requests that completed (ended) and that were abandoned (left)."""

    ended = left = 0


async def client(http: httpx.AsyncClient, chance: random.Random, counts: Counts, until: float) -> None:
    """Send one request after another until the time is up."""
    while time.monotonic() < until:
        start, length = chance.randrange(len(TEXT) - 2000), chance.randrange(20, 1500)
        body = {"prompt": TEXT[start : start + length], "max_tokens": chance.randrange(1, 100), "stream": True}
        leaves = chance.randrange(1, 40) if chance.random() < 1 / 3 else None
        async with http.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            events = 0
            async for _ in reply.aiter_lines():
                events += 1
                if events == leaves:
                    break
            done = events != leaves
        counts.ended += done
        counts.left += not done


async def row(http: httpx.AsyncClient, pid: int, counts: Counts, started: float) -> dict[str, float]:
    """The server's state now; also printed."""
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    usage = re.search(r"^vllm:kv_cache_usage_perc\S* (\S+)", (await http.get("/metrics")).text, re.MULTILINE)
    assert found is not None
    assert usage is not None
    minutes, megabytes = (time.monotonic() - started) / 60, int(found[1]) * 1024 / 1e6
    numbers = round(minutes, 2), counts.ended, counts.left, round(megabytes, 1), round(float(usage[1]), 3)
    print(" | ".join(map(str, numbers)), flush=True)
    return dict(zip(("minutes", "ended", "left", "MB", "kv use"), numbers, strict=True))


async def soak(url: str, pid: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Load the server and watch it; the last row is for the idle server."""
    started, counts = time.monotonic(), Counts()
    until, rows = started + 60 * options.minutes, []
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        crowd = [client(http, random.Random(number), counts, until) for number in range(options.concurrency)]
        load = asyncio.gather(*crowd)
        while not load.done():
            await asyncio.wait({load}, timeout=options.every)
            rows.append(await row(http, pid, counts, started))
        await load
        await asyncio.sleep(1)
        rows.append(await row(http, pid, counts, started))
    return rows


def main() -> None:
    """Start a server, load it, print rows and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--minutes", type=float, default=2)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--every", type=float, default=10, help="seconds between rows")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with serving(options.model, ["--kv-memory", "256MiB"]) as url:
        # The server is this process's only child.
        pid = int(Path(f"/proc/self/task/{os.getpid()}/children").read_text())
        print("minutes | ended | left | MB | kv use")
        rows = asyncio.run(soak(url, pid, options))
    arguments = {name: value for name, value in vars(options).items() if name != "json"}
    result = json.dumps({"machine": describe_machine(), "arguments": arguments, "rows": rows}, indent=2)
    print(result)
    if options.json:
        options.json.write_text(result + "\n")


if __name__ == "__main__":
    main()
