"""Answers that come in parts, and clients that leave before the end."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from pydantic import BaseModel
from sse_starlette import EventSourceResponse
from sse_starlette.sse import SendTimeoutError
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mor.serve.async_engine import AsyncEngine
from mor.serve.errors import HTTPError
from mor.serve.request_stream import RequestStream
from mor.serve.served_model import ServedModel

_PING = 15  # seconds between the comments that keep a silent connection open
_DONE = b"data: [DONE]\n\n"
_CLIENT_LEFT = 499  # nobody reads it but the log


class TokenStream(EventSourceResponse):
    """Server-sent events of a request; when they end, for whatever reason, so does the request."""

    def __init__(
        self,
        chunks: AsyncIterator[BaseModel],
        bridge: AsyncEngine,
        ticket: RequestStream,
        send_timeout: float,
    ) -> None:
        super().__init__(
            _events(chunks),
            ping=_PING,
            send_timeout=send_timeout,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._bridge, self._ticket = bridge, ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:  # the client does not read: its connection is closed
            pass
        finally:
            self._bridge.release(self._ticket)


async def _events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n".encode()
    except HTTPError as error:
        yield f"data: {json.dumps(error.body.model_dump())}\n\n".encode()
    else:
        yield _DONE


async def respond(
    service: ServedModel,
    request: Request,
    ticket: RequestStream,
    work: AsyncIterator[BaseModel] | Coroutine[Any, Any, Response],
) -> Response:
    """A stream, or the whole answer; if the client leaves before, the work is given up."""
    if isinstance(work, AsyncIterator):
        return TokenStream(work, service.engine, ticket, service.config.send_timeout)
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=_CLIENT_LEFT)
    finally:
        for each in (task, gone):
            each.cancel()
        service.engine.release(ticket)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
