"""What stands before the routes: the API key and the limit on bodies. Plain ASGI, so that streams pass untouched."""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.server.errors import ApiError

#: Open to everybody: probes have no key, and a browser has none before the page has asked for it.
OPEN_PATHS = frozenset({"/health", "/"})


class KeyGuard:
    """Lets requests through that carry `Authorization: Bearer KEY`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS and not self._holds(Headers(scope=scope)):
            message = "a valid API key is needed; send it as 'Authorization: Bearer KEY'"
            error = ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _holds(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        # In a time that does not depend on where the keys differ.
        return hmac.compare_digest(key.encode("latin-1"), self._key) and scheme.lower() == "bearer"


class BodyLimit:
    """Refuses bodies of more than so many bytes, before they are read where their length is stated."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        stated = Headers(scope=scope).get("content-length", "")
        if stated.isdecimal() and int(stated[:20]) > self._limit:
            await self._error().response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise self._error()
            return message

        await self._app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit:,} bytes; send less", code="body_too_large")
