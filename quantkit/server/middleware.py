"""ASGI middleware: API key and body limits. Plain ASGI, so that streams pass through untouched."""

import asyncio
import hmac
from base64 import b64decode

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.server.errors import ApiError, timed_out

#: Needs no key: health probes have none.
_OPEN = "/health"
#: The page, and the challenge that makes a browser ask for the key and then send it with every call of the page.
_PAGE, _BROWSER = "/", 'Basic realm="quantkit", charset="UTF-8"'


class ApiKeyMiddleware:
    """Requires `Authorization: Bearer KEY`, or the key as the password of basic authentication (RFC 7617).

    A browser also sends the password with requests that other sites' pages make. They are harmless: GET changes nothing, and
    bodies must be JSON, for which a browser first asks the server's permission (CORS preflight), which is never given.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        assert key, "an empty key protects nothing"
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] != _OPEN and not self._holds(Headers(scope=scope)):
            message = "a valid API key is needed; send it as 'Authorization: Bearer KEY', or as the password in a browser"
            headers = {"WWW-Authenticate": _BROWSER if scope["path"] == _PAGE else "Bearer"}
            await ApiError(401, message, code="invalid_api_key", headers=headers).response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _holds(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        key = _password(given) if scheme.lower() == "basic" else given.encode("latin-1")
        # Constant time: how long it takes does not tell where the keys differ.
        return hmac.compare_digest(key, self._key) and scheme.lower() in ("bearer", "basic")


def _password(credentials: str) -> bytes:
    """The password in base64-encoded `user:password`; the user does not matter."""
    try:
        return b64decode(credentials, validate=True).partition(b":")[2]
    except ValueError:
        return b""


class BodyLimitMiddleware:
    """Refuses bodies that are larger than `limit` bytes or take longer than `timeout` seconds to arrive.

    A body whose Content-Length is too large is refused before it is read.
    """

    def __init__(self, app: ASGIApp, limit: int, timeout: float) -> None:
        self._app, self._limit, self._timeout = app, limit, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) > self._limit:
            await self._too_large().response()(scope, receive, send)
            return
        clock, seen, more = asyncio.get_running_loop().time, 0, True
        end = clock() + self._timeout

        async def counted() -> Message:
            nonlocal seen, more
            try:
                message = await asyncio.wait_for(receive(), end - clock() if more else None)
            except asyncio.TimeoutError:
                raise timed_out(self._timeout) from None
            seen, more = seen + len(message.get("body", b"")), message.get("more_body", False)
            if seen > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, counted, send)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit:,} bytes; send less", code="body_too_large")
