"""A server of our own for as long as it is measured: `quantkit serve` as a child process on a free port."""

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

#: Seconds between two looks at whether it is ready, and for it to end before it is killed.
_LOOK, _GRACE = 0.1, 30.0


@contextmanager
def serving(
    model: str,
    arguments: Sequence[str],
    api_key: str | None = None,
    command: Sequence[str] = (sys.executable, "-m", "quantkit"),
) -> Iterator[str]:
    """Serve a model; gives the server's URL once it takes requests.

    Args:
        model: as `quantkit serve` has it.
        arguments: more of its arguments.
        api_key: what it asks for; None: what its environment says.
        command: what runs quantkit.

    Raises:
        QuantkitError: the server ended instead; the message is its last line.
    """
    port = _free_port()
    # The last of two options of a name counts, and where it listens is decided here.
    line = [*command, "serve", model, *arguments, "--host", "127.0.0.1", "--port", str(port), "-q"]
    key = {} if api_key is None else {"QUANTKIT_API_KEY": api_key}  # Not on the command line, which everybody sees.
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=log, env=os.environ | key)
        try:
            _await_ready(child, f"http://127.0.0.1:{port}", log)
            yield f"http://127.0.0.1:{port}"
        finally:
            child.terminate()
            try:
                child.wait(_GRACE)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await_ready(child: "subprocess.Popen[bytes]", url: str, log: IO[str]) -> None:
    """Come back when the server takes requests, however long its model takes to load."""
    with httpx.Client(base_url=url, trust_env=False) as http:
        while child.poll() is None:
            try:
                if http.get("/health").is_success:
                    return
            except httpx.TransportError:
                pass  # It does not listen yet.
            time.sleep(_LOOK)
    log.seek(0)
    said = [line for line in log.read().splitlines() if line.strip()]
    raise QuantkitError(f"quantkit serve ended with status {child.returncode}: {said[-1] if said else 'it said nothing'}")
