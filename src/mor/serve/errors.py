"""`HTTPError` and its making: errors in OpenAI's shape, one sentence each, never a stack trace."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import Response

from mor.errors import CapacityError, MorError
from mor.serve.openai.protocol import ErrorDetail, ErrorResponse

_TYPES = (  # by status, as OpenAI names them
    (401, "authentication_error"),
    (404, "not_found_error"),
    (429, "rate_limit_error"),
)
_MAX_MESSAGE = 1000  # characters; messages may quote what a client sent


class HTTPError(Exception):
    """An error with the HTTP response that tells it to the client.

    Args:
        status: HTTP status.
        message: one sentence, cause and cure.
        param: the field of the request that is wrong.
        code: a short name for programs, such as `model_not_found`.
        headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> ErrorResponse:
        """The JSON value of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return ErrorResponse(
            error=ErrorDetail(
                message=truncate(str(self)),
                type=dict(_TYPES).get(self.status, kind),
                param=self.param,
                code=self.code,
            )
        )

    @property
    def response(self) -> Response:
        """The HTTP response."""
        return json_response(self.body.model_dump(), self.status, self.headers)


def json_response(
    content: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response; lone surrogates, which UTF-8 cannot hold, become question marks."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = text.encode("utf-8", "replace")
    return Response(data, status, dict(headers or {}), media_type="application/json")


def truncate(text: str) -> str:
    """The text, cut after a thousand characters."""
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}.."


def from_engine_error(error: MorError) -> HTTPError:
    """A 400 with the engine's message: what the engine refuses is wrong with the request."""
    code = "capacity_exceeded" if isinstance(error, CapacityError) else None
    return HTTPError(400, str(error), code=code)


def validation_error(errors: Sequence[Mapping[str, Any]]) -> HTTPError:
    """A 400 for a request body, from pydantic's errors: the first wrong field, all its errors."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return HTTPError(400, f"the body is not valid JSON: {_reason(first)}.")
    name, kind = _field(first), first["type"]
    if not name:
        return HTTPError(400, _sentence(first))
    if kind == "extra_forbidden":
        message = f"{name} is not a field that this server supports: leave it out."
        return HTTPError(400, message, param=name, code="unsupported_field")
    if kind == "missing":
        return HTTPError(400, f"{name} is missing: the request needs it.", param=name)
    # A field that is a union has an error for each of its branches, several of them alike.
    sentences = dict.fromkeys(
        _sentence(e) for e in errors if _field(e).startswith(name.split(".")[0])
    )
    return HTTPError(400, f"{name}: {' '.join(sentences)}", param=name)


def _field(error: Mapping[str, Any]) -> str:
    """The path of the wrong field, such as `messages.0.content`, without the branches of unions."""
    path = [part for part in error["loc"][1:] if not _is_branch(part)]
    return truncate(".".join(map(str, path)))


def _is_branch(part: int | str) -> bool:
    """Whether a part of pydantic's path names a union's branch, such as `list[str]`."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "function-after"))


def _sentence(error: Mapping[str, Any]) -> str:
    text = str(error["msg"]).removeprefix("Value error, ")
    return text if text.endswith(".") else f"{text}."


def _reason(error: Mapping[str, Any]) -> str:
    return str(error.get("ctx", {}).get("error", error["msg"]))
