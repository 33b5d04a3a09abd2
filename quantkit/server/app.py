"""The application: what is served, and its routes.

Whoever wants to watch the engine adds an `Observer` to `served.runner.observers` in `create_app`, and whoever has routes of
their own includes their router there.
"""

import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

import quantkit
from quantkit.data.prompts import Prompt
from quantkit.runtime.core.request import Request
from quantkit.runtime.session import Session
from quantkit.server import errors
from quantkit.server.constrain import schema_of
from quantkit.server.errors import ApiError
from quantkit.server.forms import ChatForm, CompletionForm, Echo, Form
from quantkit.server.guards import BodyLimit, KeyGuard
from quantkit.server.live import Live
from quantkit.server.metrics import Metrics
from quantkit.server.monitor import monitor_routes
from quantkit.server.reply import Reply
from quantkit.server.runner import Runner
from quantkit.server.schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from quantkit.server.text import Texts


@dataclass(frozen=True)
class ServerConfig:
    """How a model is served.

    Attributes:
        name: of the model, as clients have it.
        max_batch: sequences that run at a time, as the engine was told.
        max_waiting: sequences that may wait beside them; beyond these, requests get 429.
        request_timeout: seconds that a request's body may take to come, and then the request itself.
        max_body: bytes of a request's body at most.
        api_key: what every route but /health asks for; None: nothing.
    """

    name: str
    max_batch: int
    max_waiting: int = 256
    request_timeout: float = 600.0
    max_body: int = 4 * 2**20
    api_key: str | None = None


class Served:
    """A model, its engine's thread and its tokenizer, behind a name."""

    def __init__(self, session: Session, config: ServerConfig) -> None:
        self.session, self.config, self.created = session, config, int(time.time())
        self.runner = Runner(session.engine, config.max_batch + config.max_waiting)
        self.texts = Texts(session)

    def check_model(self, name: str | None) -> None:
        """
        Raises:
            ApiError: another model is asked for.
        """
        if name is not None and name != self.config.name:
            message = f"there is no model {name[:80]!r} here; this server has {self.config.name!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` has it."""
        length = self.session.model.max_model_len
        card = {"id": self.config.name, "object": "model", "created": self.created, "owned_by": "quantkit"}
        return card | {"max_model_len": length}

    async def completions(self, body: CompletionBody) -> Reply:
        """`POST /v1/completions`."""
        prompts, samples = body.prompts, body.n or 1

        def form(requests: Sequence[Request]) -> CompletionForm:
            echoes = [Echo(p if isinstance(p, str) else None, r.prompt) for p, r in zip(prompts, requests, strict=True)]
            chosen = [echo for echo in echoes for _ in range(samples)] if body.echo else []
            return CompletionForm(self.config.name, self.texts.text, chosen)

        return await self._reply(body, prompts, form)

    async def chat(self, body: ChatBody) -> Reply:
        """`POST /v1/chat/completions`."""
        form = ChatForm(self.config.name, self.texts.text)
        return await self._reply(body, [[m.plain() for m in body.messages]], lambda _: form)

    async def tokenize(self, body: TokenizeBody) -> dict[str, Any]:
        """`POST /tokenize`."""
        self.check_model(body.model)
        prompt: Prompt = body.prompt if body.messages is None else [m.plain() for m in body.messages]  # type: ignore[assignment]
        tokens = list(await self.texts.encode(prompt))
        return {"count": len(tokens), "max_model_len": self.session.model.max_model_len, "tokens": tokens}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        """`POST /detokenize`."""
        self.check_model(body.model)
        if any(token >= self.session.model.vocab_size for token in body.tokens):
            raise ApiError(400, f"a token is outside of the vocabulary of {self.session.model.vocab_size:,}", param="tokens")
        return {"prompt": await self.texts.decode(body.tokens)}

    async def _reply(
        self,
        body: CompletionBody | ChatBody,
        prompts: Sequence[Prompt | list[int]],
        form: Callable[[Sequence[Request]], Form],
    ) -> Reply:
        self.check_model(body.model)
        params, schema = body.params(), schema_of(body.response_format)
        constraint = None if schema is None else await self.texts.constraint(schema)
        requests = [await self.texts.request(prompt, params, constraint) for prompt in prompts]
        timeout, stream = self.config.request_timeout, bool(body.stream)
        return Reply(self.runner, requests, form(requests), timeout, stream=stream, include_usage=body.include_usage)


class ErrorDetail(BaseModel):
    """What was wrong: a line for people, and words for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail


#: Errors that every route that reads a body may give, for the OpenAPI schema.
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "something in the request is wrong",
        401: "no valid API key",
        404: "no such model",
        408: "the request took too long",
        413: "the body is too large",
        429: "too many requests wait",
        500: "the request failed in the server",
        503: "the server is shutting down",
    }.items()
}


def create_app(session: Session, config: ServerConfig) -> FastAPI:
    """The application; its engine thread runs from start-up to shutdown, and `app.state.served` is what it serves."""
    served = Served(session, config)
    stats = session.engine.stats
    metrics, live = Metrics(config.name, session.model, stats), Live(config.name, stats)
    served.runner.observers.extend((metrics, live))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        served.runner.start()
        yield
        served.runner.stop()
        served.texts.close()

    app = FastAPI(title="quantkit", version=quantkit.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.served = served
    errors.install(app)
    app.include_router(_generation(served))
    app.include_router(_state(served))
    app.include_router(monitor_routes(metrics, live))
    app.add_middleware(BodyLimit, limit=config.max_body, timeout=config.request_timeout)
    if config.api_key is not None:
        app.add_middleware(KeyGuard, key=config.api_key)
    return app


def _generation(served: Served) -> APIRouter:
    """Routes that read a body."""
    router = APIRouter(responses=_ERRORS)
    router.post("/v1/completions", response_model=None)(served.completions)
    router.post("/v1/chat/completions", response_model=None)(served.chat)
    router.post("/tokenize", response_model=None)(served.tokenize)
    router.post("/detokenize", response_model=None)(served.detokenize)
    return router


def _state(served: Served) -> APIRouter:
    """What is here and how it is."""
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served.card()]}

    @router.get("/v1/models/{model:path}", responses={404: _ERRORS[404]})
    async def model(model: str) -> dict[str, Any]:
        served.check_model(model)
        return served.card()

    @router.get("/version")
    async def version() -> dict[str, str]:
        return {"version": quantkit.__version__}

    @router.get("/health", responses={503: {"description": "the engine does not step"}})
    async def health() -> JSONResponse:
        return _status(served.runner.healthy, "the engine does not step")

    @router.get("/ready", responses={503: {"description": "no new requests are taken"}})
    async def ready() -> JSONResponse:
        return _status(served.runner.ready, "no new requests are taken")

    return router


def _status(good: bool, otherwise: str) -> JSONResponse:
    return JSONResponse({"status": "ok"}) if good else ApiError(503, otherwise, "server_error").response()
