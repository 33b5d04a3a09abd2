"""The process that serves: uvicorn, and what signals do to it.

The first SIGTERM or SIGINT drains: new requests get 503, and when the last one running has been sent the process ends with 0.
The second cuts: the process ends at once with 128 + the signal's number.
"""

import os
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from quantkit.errors import ResourceError
from quantkit.server.app import Served

#: Seconds for connections that are still open when all requests have ended.
_CLOSING = 5


class _Server(uvicorn.Server):
    """Goes on listening while it drains, so that clients hear why they are turned away."""

    def __init__(self, config: uvicorn.Config, served: Served) -> None:
        super().__init__(config)
        self._runner = served.runner

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """See the module."""
        if self._runner.draining:
            sys.stderr.flush()
            # Not sys.exit: neither a step nor a client that does not read may hold it up.
            os._exit(128 + sig)
        self._runner.draining = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        drained = self._runner.draining and self._runner.idle
        return await super().on_tick(counter) or drained


def run(app: FastAPI, host: str, port: int, *, quiet: bool) -> None:
    """Serve until a signal ends it.

    Args:
        app: of `create_app`.
        host, port: where to listen; port 0: any that is free.
        quiet: log errors only.

    Raises:
        ResourceError: it cannot listen there.
    """
    level = "error" if quiet else "info"
    # The address of a client is what its connection says; headers that claim another are not believed.
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=level,
        access_log=not quiet,
        proxy_headers=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_CLOSING,
    )
    server = _Server(config, app.state.served)
    server.run()
    if not server.started:
        raise ResourceError(f"cannot listen on {host}:{port}; choose another --port or --host")
