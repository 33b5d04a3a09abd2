"""Routes for people and their tools: `/`, a page that is one file; `/state`, which feeds it; and `/metrics`."""

from importlib import resources
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from quantkit.server.live import Live
from quantkit.server.metrics import Metrics

#: The page loads nothing from anywhere and talks to its own server only.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def monitor_routes(metrics: Metrics, live: Live) -> APIRouter:
    """The three routes."""
    router = APIRouter()
    page = resources.files("quantkit.server").joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"})

    @router.get("/state")
    async def state() -> dict[str, Any]:
        """See `Live.snapshot`."""
        return live.snapshot()

    @router.get("/metrics")
    async def exposition() -> Response:
        """In Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
