"""`App`: the HTTP application. Its routes, the errors that they answer, and its OpenAPI document.

A request passes `RequestLog`, `Auth` and `BodyLimit`, in this order, before it reaches a route.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from mor.serve.auth import Auth
from mor.serve.engine_state import EngineState
from mor.serve.errors import HTTPError, validation_error
from mor.serve.limits import BodyLimit
from mor.serve.log import RequestLog
from mor.serve.openai.chat import create_chat_completion
from mor.serve.openai.completions import create_completion
from mor.serve.openai.protocol import (
    ChatChunk,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    DepthsResponse,
    DetokenizeRequest,
    DetokenizeResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
    TokenizeRequest,
    TokenizeResponse,
    VersionResponse,
)
from mor.serve.served_model import ServedModel

_STATIC = Path(__file__).with_name("static")
_STATIC_HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
)
_STATE_TIMEOUT_S = 5.0
"""Seconds that `/metrics` waits for a busy engine; then its gauges keep their values."""


class App:
    """The ASGI application that serves one model.

    Args:
        version: of mor; `/version` and the OpenAPI document tell it.
    """

    def __init__(self, served_model: ServedModel, version: str) -> None:
        self.served_model = served_model
        self.api = _api(served_model, version)
        config = served_model.config
        limited = BodyLimit(self.api, config.max_body_bytes, config.body_timeout)
        self._log = RequestLog(Auth(limited, config.api_keys))

    @property
    def num_active(self) -> int:
        """Requests whose responses have not been sent completely."""
        return self._log.num_active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or start and stop the engine (ASGI's `lifespan`)."""
        await self._log(scope, receive, send)


def _api(served_model: ServedModel, version: str) -> FastAPI:
    """The routes without the middleware around them."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        served_model.engine.start()
        yield
        await served_model.engine.stop()

    api = FastAPI(
        title="mor",
        version=version,
        lifespan=lifespan,
        docs_url=None,  # these would load scripts of another host
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(api)
    _add_generation(api, served_model)
    _add_tokens(api, served_model)
    _add_state(api, served_model)
    _add_version(api, version)
    _add_page(api)
    api.openapi_schema = _document(api, bool(served_model.config.api_keys))
    return api


def _add_errors(api: FastAPI) -> None:
    """Answer every kind of error in OpenAI's shape."""

    async def own_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPError)
        return error.response

    async def invalid_body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response

    async def routing_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path[:200]
        messages = {
            404: f"{path} is not a route of this server.",
            405: f"{path} does not take {request.method[:20]}.",
        }
        message = messages.get(error.status_code, str(error.detail))
        return HTTPError(error.status_code, message, headers=error.headers).response

    api.add_exception_handler(HTTPError, own_error)
    api.add_exception_handler(RequestValidationError, invalid_body)
    api.add_exception_handler(HTTPException, routing_error)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of a route for the OpenAPI document; 401 is always among them."""
    return {status: {"model": ErrorResponse} for status in (401, *statuses)}


def _events(model: type[CompletionResponse | ChatChunk]) -> dict[str, Any]:
    """The event stream of a generating route for the OpenAPI document."""
    description = f"With `stream`: events whose data is a {model.__name__}, then `[DONE]`."
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {"description": description, "content": {"text/event-stream": {"schema": event}}}


_GENERATION_ERRORS = (400, 404, 408, 413, 429, 500, 503, 504)


def _add_generation(api: FastAPI, served_model: ServedModel) -> None:
    @api.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses={**_errors(*_GENERATION_ERRORS), 200: _events(CompletionResponse)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Generate completions of one prompt or several."""
        return await create_completion(served_model, body, request)

    @api.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses={**_errors(*_GENERATION_ERRORS), 200: _events(ChatChunk)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Generate the next turn of a conversation."""
        return await create_chat_completion(served_model, body, request)


def _add_tokens(api: FastAPI, served_model: ServedModel) -> None:
    @api.post("/tokenize", responses=_errors(400, 404, 408, 413))
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """The token ids of a text or of a conversation."""
        return await served_model.tokenize(body)

    @api.post("/detokenize", responses=_errors(400, 404, 408, 413))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        return served_model.detokenize(body)


def _add_state(api: FastAPI, served_model: ServedModel) -> None:
    @api.get("/v1/models", responses=_errors())
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[served_model.card])

    @api.get("/v1/models/{model:path}", responses=_errors(404))
    async def model(model: str) -> ModelCard:
        """The served model, under one of its names."""
        served_model.check_model(model)
        return served_model.card

    @api.get("/health", response_class=Response, responses={503: {"model": ErrorResponse}})
    async def health() -> Response:
        """200 while new requests are accepted, otherwise 503."""
        served_model.engine.check_admission()
        return Response()

    @api.get("/depths", responses=_errors(503, 504))
    async def depths() -> DepthsResponse:
        """What the engine holds now: requests, tokens and KV pages by depth."""
        return await served_model.depths()

    @api.get("/metrics", response_class=PlainTextResponse, responses=_errors())
    async def metrics() -> Response:
        """The metrics in the text format that Prometheus reads."""
        try:
            async with asyncio.timeout(_STATE_TIMEOUT_S):
                state = await served_model.engine.call(EngineState.of)
        except (TimeoutError, HTTPError):
            state = None
        return Response(served_model.metrics.exposition(state), media_type=CONTENT_TYPE_LATEST)


def _add_version(api: FastAPI, version: str) -> None:
    @api.get("/version", responses=_errors())
    async def mor_version() -> VersionResponse:
        """The version of mor."""
        return VersionResponse(version=version)


def _add_page(api: FastAPI) -> None:
    """Serve the files of `static/`; they are listed once, so that no path leads elsewhere."""
    files = {path.name: path for path in _STATIC.glob("*") if path.is_file()}

    def file(name: str) -> Response:
        if name not in files:
            raise HTTPError(404, f"{name[:200]!r} is not part of the page.")
        return FileResponse(files[name], headers=_STATIC_HEADERS)

    @api.get("/", include_in_schema=False)
    async def index() -> Response:
        return file("index.html")

    @api.get("/page/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return file(name)


def _document(api: FastAPI, has_keys: bool) -> dict[str, Any]:
    """The OpenAPI document. FastAPI's own 422 is taken out: validation errors are 400 here."""
    schema = get_openapi(title=api.title, version=api.version, routes=api.routes)
    for operations in schema["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    parts = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        parts["schemas"].pop(name, None)
    if has_keys:
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": list[str]()}]
    return schema
