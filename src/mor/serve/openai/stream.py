"""`respond`: sends an answer whole or as server-sent events, and ends it if the client leaves."""

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

_PING_S = 15  # between the comments that keep a silent connection open
_DONE = b"data: [DONE]\n\n"
_CLIENT_LEFT = 499  # nginx's status for it; only our log shows it


class TokenStream(EventSourceResponse):
    """A response of server-sent events; when it ends, for whatever reason, so does the request.

    Args:
        send_timeout: seconds that the client may take to read an event.
    """

    def __init__(
        self,
        chunks: AsyncIterator[BaseModel],
        engine: AsyncEngine,
        stream: RequestStream,
        send_timeout: float,
    ) -> None:
        super().__init__(
            _events(chunks),
            ping=_PING_S,
            send_timeout=send_timeout,
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )
        self._engine = engine
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, then release the stream."""
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:  # the client does not read: its connection is closed by now
            pass
        finally:
            self._engine.release(self._stream)


async def _events(chunks: AsyncIterator[BaseModel]) -> AsyncIterator[bytes]:
    """An event for each chunk, then `[DONE]`; or an event with the error, and no `[DONE]`."""
    try:
        async for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n".encode()
    except HTTPError as error:
        yield f"data: {json.dumps(error.body.model_dump())}\n\n".encode()
    else:
        yield _DONE


async def respond(
    served_model: ServedModel,
    request: Request,
    stream: RequestStream,
    work: AsyncIterator[BaseModel] | Coroutine[Any, Any, Response],
) -> Response:
    """The response that `work` makes; the stream is released when it is sent or the client leaves.

    Args:
        work: an iterator over chunks to be streamed, or a coroutine of the whole response.
    """
    if isinstance(work, AsyncIterator):
        timeout = served_model.config.send_timeout
        return TokenStream(work, served_model.engine, stream, timeout)
    # Nothing is sent before the end, so that only reading from the connection shows a client gone.
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=_CLIENT_LEFT)
    finally:
        for each in (task, gone):
            each.cancel()
        served_model.engine.release(stream)


async def _disconnect(request: Request) -> None:
    """Return when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
