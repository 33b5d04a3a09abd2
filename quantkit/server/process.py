"""The serving process: uvicorn, and its reaction to signals.

The first SIGTERM or SIGINT drains: new requests get 503, and the process exits with 0 once the last running request has been
answered. The second one aborts: the process exits at once with 128 + the signal's number.
"""

import os
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from quantkit.errors import ResourceError
from quantkit.server.app import ModelEndpoints

#: Seconds that open connections get to close after all requests have ended.
_CLOSE_SECONDS = 5


class _Server(uvicorn.Server):
    """Keeps listening while it drains, so that clients get a 503 with the reason."""

    def __init__(self, config: uvicorn.Config, endpoints: ModelEndpoints) -> None:
        super().__init__(config)
        self._engine_thread = endpoints.engine_thread

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain, or abort; see the module."""
        if self._engine_thread.draining:
            sys.stderr.flush()
            # Not sys.exit: neither a running step nor a client that does not read may delay the exit.
            os._exit(128 + sig)
        self._engine_thread.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Called ten times per second: whether to exit."""
        drained = self._engine_thread.draining and self._engine_thread.idle
        return await super().on_tick(counter) or drained


def run(app: FastAPI, host: str, port: int, *, quiet: bool) -> None:
    """Serve until a signal ends the process.

    Args:
        app: from `create_app`.
        host, port: where to listen; port 0: any free port.
        quiet: log errors only.

    Raises:
        ResourceError: the address cannot be listened on.
    """
    level = "error" if quiet else "info"
    # A client's address is that of its connection; headers that claim another one are not trusted.
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=level,
        access_log=not quiet,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    server = _Server(config, app.state.endpoints)
    server.run()
    if not server.started:
        raise ResourceError(f"cannot listen on {host}:{port}; choose another --port or --host")
