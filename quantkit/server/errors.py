"""Errors as clients see them: OpenAI's JSON, one line that says what is wrong, never a traceback or a path."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from quantkit.errors import RequestError
from quantkit.server.job import BusyError, DrainingError, EngineDiedError

logger = logging.getLogger("quantkit.server")

#: Most fields that one message names.
_MAX_NAMED = 4


class ApiError(HTTPException):
    """An HTTP error with OpenAI's error body."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            status: HTTP status.
            message: one line for people.
            kind: `type` in the body.
            param: the invalid field.
            code: identifies the error for programs.
            headers: additional response headers.
        """
        super().__init__(status, message, dict(headers or {}))
        self.kind, self.param, self.code = kind, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        # Names of unknown fields are echoed. They may hold lone surrogates, which UTF-8 cannot encode.
        message, param = (text and text.encode(errors="replace").decode() for text in (self.detail, self.param))
        return {"error": {"message": message, "type": self.kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def timed_out(seconds: float) -> ApiError:
    """The error of a request that ran out of time. Clients that retry a 408 are told not to: it would take as long again."""
    message = f"the request took longer than {seconds:g} s"
    return ApiError(408, message, "timeout_error", code="timeout", headers={"X-Should-Retry": "false"})


def api_error(error: Exception) -> ApiError:
    """The client's view of an exception. Unexpected exceptions are logged here, and clients only learn that there was one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError):
        return ApiError(400, str(error))
    if isinstance(error, RequestValidationError):
        return _invalid(error.errors())
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail), headers=error.headers)
    if isinstance(error, BusyError):
        busy = "too many requests are waiting; retry later"
        return ApiError(429, busy, "rate_limit_error", code="queue_full", headers={"Retry-After": "1"})
    if isinstance(error, DrainingError):
        return ApiError(503, "the server is shutting down", "server_error", code="shutting_down", headers={"Retry-After": "5"})
    if isinstance(error, EngineDiedError):
        return ApiError(503, "the engine has stopped; restart the server", "server_error", code="engine_stopped")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the request failed in the server; its log says why", "server_error", code="internal_error")


def install_error_handlers(app: FastAPI) -> None:
    """Register handlers that turn every exception into an `ApiError` response."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in (HTTPException, RequestValidationError, RequestError, BusyError, DrainingError, EngineDiedError, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """All validation errors of a body in one line; the first invalid field is the `param`."""
    # A field with several allowed types gives one error per type.
    reasons: dict[str, list[str]] = {}
    for error in errors:
        reasons.setdefault(_field(error["loc"]), []).append(_reason(error))
    lines = [": ".join(filter(None, (name, ", or ".join(dict.fromkeys(why))))) for name, why in reasons.items()]
    more = f"; and {len(lines) - _MAX_NAMED} more" if len(lines) > _MAX_NAMED else ""
    code = "unknown_parameter" if errors[0]["type"] == "extra_forbidden" else None
    return ApiError(400, "; ".join(lines[:_MAX_NAMED]) + more, param=next(iter(reasons)) or None, code=code)


def _field(loc: Sequence[str | int]) -> str:
    """`messages.0.content` for ("body", "messages", 0, "content", "str"); "" for the body itself or an offset in its text."""
    if len(loc) == 2 and isinstance(loc[1], int):
        return ""
    return ".".join(str(part)[:80] for part in loc[1:] if isinstance(part, int) or (part != "str" and "[" not in part))


def _reason(error: Mapping[str, Any]) -> str:
    kind = error["type"]
    if kind == "extra_forbidden":
        return "unknown field"
    if kind == "json_invalid":
        return f"the body is not valid JSON ({error['ctx']['error']})"
    if kind == "model_attributes_type" and len(error["loc"]) == 1:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    return str(error["msg"]).removeprefix("Value error, ")
