"""The FastAPI application: the endpoints of one model, and their routes.

To watch the engine, add an `Observer` to `endpoints.engine_thread.observers` in `create_app`. To add routes, include a router
there.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from quantkit.data.prompts import Prompt
from quantkit.runtime.core.request import Request
from quantkit.runtime.session import Session
from quantkit.server import errors
from quantkit.server.dashboard import Dashboard
from quantkit.server.engine_thread import EngineThread
from quantkit.server.errors import ApiError
from quantkit.server.generation_response import GenerationResponse
from quantkit.server.metrics import PrometheusMetrics
from quantkit.server.middleware import ApiKeyMiddleware, BodyLimitMiddleware
from quantkit.server.monitor import monitor_routes
from quantkit.server.response_builder import ChatResponseBuilder, CompletionResponseBuilder, Echo, ResponseBuilder
from quantkit.server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from quantkit.server.tokenizer_worker import TokenizerWorker
from quantkit.version import __version__


@dataclass(frozen=True)
class ServerConfig:
    """How a model is served.

    Attributes:
        name: the model's name for clients.
        max_batch: sequences that run at a time; the same number as in `EngineConfig`.
        max_waiting: sequences that may wait in addition; when the queue is full, requests get 429.
        request_timeout: seconds for receiving the body, and again for the request itself.
        max_body: largest body of a request, bytes.
        api_key: required on every route but /health; None: no key is needed.
    """

    name: str
    max_batch: int
    max_waiting: int = 256
    request_timeout: float = 600.0
    max_body: int = 4 * 2**20
    api_key: str | None = None


class ModelEndpoints:
    """The endpoints of one model: its engine's thread, its tokenizer, and one method per generating or tokenizing route."""

    def __init__(self, session: Session, config: ServerConfig) -> None:
        self.session, self.config, self.created = session, config, int(time.time())
        self.engine_thread = EngineThread(session.engine, config.max_batch + config.max_waiting)
        self.tokenizer = TokenizerWorker(session)

    def check_model(self, name: str | None) -> None:
        """Check that a request names this model, or none.

        Raises:
            ApiError: it names another model.
        """
        if name is not None and name != self.config.name:
            message = f"there is no model {name[:80]!r} here; this server has {self.config.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def card(self) -> dict[str, Any]:
        """The model's entry in `/v1/models`."""
        length = self.session.model.max_model_len
        card = {"id": self.config.name, "object": "model", "created": self.created, "owned_by": "quantkit"}
        return card | {"max_model_len": length}

    async def completions(self, body: CompletionBody) -> GenerationResponse:
        """`POST /v1/completions`."""
        prompts, samples = body.prompts, body.n or 1

        def builder(requests: Sequence[Request]) -> CompletionResponseBuilder:
            echoes = [Echo(p if isinstance(p, str) else None, r.prompt) for p, r in zip(prompts, requests, strict=True)]
            chosen = [echo for echo in echoes for _ in range(samples)] if body.echo else []
            return CompletionResponseBuilder(self.config.name, self.tokenizer.text, chosen)

        return await self._respond(body, prompts, builder)

    async def chat(self, body: ChatBody) -> GenerationResponse:
        """`POST /v1/chat/completions`."""
        builder = ChatResponseBuilder(self.config.name, self.tokenizer.text)
        return await self._respond(body, [[m.plain() for m in body.messages]], lambda _: builder)

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """`POST /tokenize`."""
        self.check_model(body.model)
        prompt: Prompt = body.prompt if body.messages is None else [m.plain() for m in body.messages]  # type: ignore[assignment]
        tokens = list(await self.tokenizer.encode(prompt))
        return {"count": len(tokens), "max_model_len": self.session.model.max_model_len, "tokens": tokens}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """`POST /detokenize`."""
        self.check_model(body.model)
        if any(token >= self.session.model.vocab_size for token in body.tokens):
            raise ApiError(400, f"a token is outside the vocabulary of {self.session.model.vocab_size:,}", param="tokens")
        return {"prompt": await self.tokenizer.decode(body.tokens)}

    async def _respond(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Prompt | list[int]],
        builder: Callable[[Sequence[Request]], ResponseBuilder],
    ) -> GenerationResponse:
        self.check_model(body.model)
        params, schema = body.params(), body.json_schema
        constraint = None if schema is None else await self.tokenizer.constraint(schema)
        requests = [await self.tokenizer.request(prompt, params, constraint) for prompt in prompts]
        timeout, stream = self.config.request_timeout, bool(body.stream)
        return GenerationResponse(
            self.engine_thread, requests, builder(requests), timeout, stream=stream, include_usage=body.include_usage
        )


class ErrorDetail(BaseModel):
    """An error: `message` for people, `type`, `param` and `code` for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


#: Errors of every route that reads a body, for the OpenAPI schema.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "the request is invalid",
        401: "no valid API key",
        404: "no such model",
        408: "the request took too long",
        413: "the body is too large",
        429: "too many requests are waiting",
        500: "the request failed in the server",
        503: "the server is shutting down",
    }.items()
}


def create_app(session: Session, config: ServerConfig) -> FastAPI:
    """The application. Its engine thread runs from start-up to shutdown; `app.state.endpoints` holds its `ModelEndpoints`."""
    endpoints = ModelEndpoints(session, config)
    stats = session.engine.stats
    metrics, dashboard = PrometheusMetrics(config.name, session.model, stats), Dashboard(config.name, stats)
    endpoints.engine_thread.observers.extend((metrics, dashboard))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        endpoints.engine_thread.start()
        yield
        endpoints.engine_thread.stop()
        endpoints.tokenizer.close()

    app = FastAPI(title="quantkit", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.endpoints = endpoints
    errors.install_error_handlers(app)
    app.include_router(_body_routes(endpoints))
    app.include_router(_state_routes(endpoints))
    app.include_router(monitor_routes(metrics, dashboard))
    app.add_middleware(BodyLimitMiddleware, limit=config.max_body, timeout=config.request_timeout)
    if config.api_key is not None:
        app.add_middleware(ApiKeyMiddleware, key=config.api_key)
    return app


def _body_routes(endpoints: ModelEndpoints) -> APIRouter:
    """Routes that read a body."""
    router = APIRouter(responses=_ERRORS)
    router.post("/v1/completions", response_model=None)(endpoints.completions)
    router.post("/v1/chat/completions", response_model=None)(endpoints.chat)
    router.post("/tokenize", response_model=None)(endpoints.tokenize)
    router.post("/detokenize", response_model=None)(endpoints.detokenize)
    return router


def _state_routes(endpoints: ModelEndpoints) -> APIRouter:
    """Routes that describe the server and its state."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [endpoints.card()]}

    @router.get("/v1/models/{model:path}", responses={404: _ERRORS[404]})
    async def model(model: str) -> dict[str, Any]:
        endpoints.check_model(model)
        return endpoints.card()

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @router.get("/health", responses={503: {"description": "the engine does not step"}})
    async def health() -> JSONResponse:
        return _status(endpoints.engine_thread.healthy, "the engine does not step")

    @router.get("/ready", responses={503: {"description": "no new requests are taken"}})
    async def ready() -> JSONResponse:
        return _status(endpoints.engine_thread.ready, "no new requests are taken")

    return router


def _status(good: bool, otherwise: str) -> JSONResponse:
    return JSONResponse({"status": "ok"}) if good else ApiError(503, otherwise, "server_error").response()
