"""The HTTP application: routes, errors, and the document that describes them."""

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
_STATE_SECONDS = 5.0  # that `/metrics` waits for a busy engine


class App:
    """The ASGI application of one service, and how many requests it works on."""

    def __init__(self, service: ServedModel, version: str) -> None:
        self.service = service
        self.api = _api(service, version)
        config = service.config
        limited = BodyLimit(self.api, config.max_body_bytes, config.body_timeout)
        self._log = RequestLog(Auth(limited, config.api_keys))

    @property
    def num_active(self) -> int:
        """Requests whose answers are not sent yet."""
        return self._log.num_active

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        await self._log(scope, receive, send)


def _api(service: ServedModel, version: str) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        service.engine.start()
        yield
        await service.engine.stop()

    api = FastAPI(
        title="mor",
        version=version,
        lifespan=lifespan,
        docs_url=None,  # these would load scripts of another host
        redoc_url=None,
        redirect_slashes=False,
    )
    _add_errors(api)
    _add_generation(api, service)
    _add_tokens(api, service)
    _add_state(api, service)
    _add_version(api, version)
    _add_page(api)
    api.openapi_schema = _document(api, bool(service.config.api_keys))
    return api


def _add_errors(api: FastAPI) -> None:
    async def known(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPError)
        return error.response

    async def body(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return validation_error(error.errors()).response

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path[:200]
        said = {
            404: f"{path} is not a route of this server.",
            405: f"{path} does not take {request.method[:20]}.",
        }
        message = said.get(error.status_code, str(error.detail))
        return HTTPError(error.status_code, message, headers=error.headers).response

    api.add_exception_handler(HTTPError, known)
    api.add_exception_handler(RequestValidationError, body)
    api.add_exception_handler(HTTPException, http)


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What the document says of errors: one shape for all."""
    return {status: {"model": ErrorResponse} for status in (401, *statuses)}


def _events(model: type[CompletionResponse | ChatChunk]) -> dict[str, Any]:
    about = f"With `stream`: events whose data is a {model.__name__}, then `[DONE]`."
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
    return {"description": about, "content": {"text/event-stream": {"schema": event}}}


_GENERATION_ERRORS = (400, 404, 408, 413, 429, 500, 503, 504)


def _add_generation(api: FastAPI, service: ServedModel) -> None:
    @api.post(
        "/v1/completions",
        response_model=CompletionResponse,
        responses={**_errors(*_GENERATION_ERRORS), 200: _events(CompletionResponse)},
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        return await create_completion(service, body, request)

    @api.post(
        "/v1/chat/completions",
        response_model=ChatResponse,
        responses={**_errors(*_GENERATION_ERRORS), 200: _events(ChatChunk)},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        return await create_chat_completion(service, body, request)


def _add_tokens(api: FastAPI, service: ServedModel) -> None:
    @api.post("/tokenize", responses=_errors(400, 404, 408, 413))
    async def tokenize(body: TokenizeRequest) -> TokenizeResponse:
        """Token ids of a text or a conversation."""
        return await service.tokenize(body)

    @api.post("/detokenize", responses=_errors(400, 404, 408, 413))
    async def detokenize(body: DetokenizeRequest) -> DetokenizeResponse:
        """The text of token ids."""
        return service.detokenize(body)


def _add_state(api: FastAPI, service: ServedModel) -> None:
    @api.get("/v1/models", responses=_errors())
    async def models() -> ModelList:
        """The served model."""
        return ModelList(data=[service.card])

    @api.get("/v1/models/{model:path}", responses=_errors(404))
    async def model(model: str) -> ModelCard:
        """The served model, by its name."""
        service.check_model(model)
        return service.card

    @api.get("/health", response_class=Response, responses={503: {"model": ErrorResponse}})
    async def health() -> Response:
        """200 while requests are taken."""
        service.engine.check_admission()
        return Response()

    @api.get("/depths", responses=_errors(503, 504))
    async def depths() -> DepthsResponse:
        """The engine at this moment."""
        return await service.depths()

    @api.get("/metrics", response_class=PlainTextResponse, responses=_errors())
    async def metrics() -> Response:
        """For Prometheus."""
        try:
            async with asyncio.timeout(_STATE_SECONDS):
                state = await service.engine.call(EngineState.of)
        except (TimeoutError, HTTPError):
            state = None
        return Response(service.metrics.exposition(state), media_type=CONTENT_TYPE_LATEST)


def _add_version(api: FastAPI, version: str) -> None:
    @api.get("/version", responses=_errors())
    async def mor_version() -> VersionResponse:
        """The version of mor."""
        return VersionResponse(version=version)


def _add_page(api: FastAPI) -> None:
    """The depth page. What lies in its folder now is all that is ever given out."""
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
    """OpenAPI's description, without FastAPI's own shape of validation errors, which are 400."""
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
