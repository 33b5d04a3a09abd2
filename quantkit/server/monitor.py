"""Monitoring routes: `/`, a page in one file; `/state`, the numbers on it; and `/metrics` for Prometheus."""

from importlib import resources
from typing import Any

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from quantkit.server.dashboard import Dashboard
from quantkit.server.metrics import PrometheusMetrics

#: The page loads nothing from other origins and calls only its own server.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def monitor_routes(metrics: PrometheusMetrics, dashboard: Dashboard) -> APIRouter:
    """The router with the three routes."""
    router = APIRouter()
    page = resources.files("quantkit.server").joinpath("page.html").read_text(encoding="utf-8")

    @router.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"})

    @router.get("/state")
    async def state() -> dict[str, Any]:
        """See `Dashboard.snapshot`."""
        return dashboard.snapshot()

    @router.get("/metrics")
    async def exposition() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
