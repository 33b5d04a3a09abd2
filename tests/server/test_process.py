"""`quantkit serve` as a process, and its reaction to signals."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from helpers.live_server import tiny_folder, wait

LONG = {"prompt": "Hello", "max_tokens": 220, "ignore_eos": True, "stream": True}


def _started(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [sys.executable, "-m", "quantkit", "serve", str(folder), "--port", str(port), "-q"]
    process = subprocess.Popen(command, env=os.environ | {"QUANTKIT_API_KEY": "k"})
    url = f"http://127.0.0.1:{port}"
    wait(lambda: process.poll() is not None or _ready(url))
    assert process.poll() is None
    return process, url


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/ready", headers={"Authorization": "Bearer k"}).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_first_signal_drains_and_the_second_cuts(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    headers = {"Authorization": "Bearer k"}
    process, url = _started(folder)
    with httpx.stream("POST", url + "/v1/completions", json=LONG, headers=headers, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert process.wait(30) == 0

    process, url = _started(folder)
    many = {**LONG, "n": 32, "temperature": 1}
    with httpx.stream("POST", url + "/v1/completions", json=many, headers=headers, timeout=60) as reply:
        next(reply.iter_lines())
        process.send_signal(signal.SIGTERM)
        wait(lambda: not _ready(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in (128 + signal.SIGTERM, 0)  # 0: it had finished all requests before
