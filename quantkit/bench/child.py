"""Run `quantkit serve` as a child process on a free port while it is measured."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

import httpx

from quantkit.errors import QuantkitError

#: Seconds between readiness checks, and for the server to exit before it is killed.
_POLL_SECONDS, _EXIT_SECONDS = 0.1, 30.0


@contextmanager
def serving(
    model: str,
    arguments: Sequence[str],
    api_key: str | None = None,
    command: Sequence[str] = (sys.executable, "-m", "quantkit"),
) -> Iterator[str]:
    """Serve a model; yields the server's URL once it accepts requests.

    Args:
        model: MODEL of `quantkit serve`.
        arguments: further arguments of it.
        api_key: the key that the server requires; None: the one in the environment, if any.
        command: how to run quantkit.

    Raises:
        QuantkitError: the server exited instead; the message is its last line of output.
    """
    port = _free_port()
    # Of an option that is given twice the last one counts, so --host and --port come last.
    line = [*command, "serve", model, *arguments, "--host", "127.0.0.1", "--port", str(port), "-q"]
    key = {} if api_key is None else {"QUANTKIT_API_KEY": api_key}  # Not on the command line, which other users can see.
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | key)
        try:
            _await_ready(child, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()
            try:
                child.wait(_EXIT_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await_ready(child: "subprocess.Popen[bytes]", url: str, log: IO[str]) -> None:
    """Wait until the server accepts requests, however long its model takes to load."""
    with httpx.Client(base_url=url, trust_env=False) as http:
        while child.poll() is None:
            try:
                if http.get("/health").is_success:
                    return
            except httpx.TransportError:
                pass  # It is not listening yet.
            time.sleep(_POLL_SECONDS)
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()]
    raise QuantkitError(f"quantkit serve exited with status {child.returncode}: {lines[-1] if lines else 'no output'}")
