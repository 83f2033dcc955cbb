"""`BodyLimit`: ASGI middleware that limits a request body's size and how long it may take."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.serve.errors import HTTPError


class BodyLimit:
    """Reads the whole body before the application sees the request; answers 408 or 413.

    Args:
        seconds: that the body may take to arrive.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on once its body is complete, or answer 408 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            # What the client claims; `_read` counts what really comes.
            length = Headers(scope=scope).get("content-length", "0")
            if not length.isdigit() or int(length[:20]) > self._max_bytes:
                raise self._too_large()
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except HTTPError as error:
            await error.response(scope, receive, send)
        except TimeoutError:
            late = HTTPError(
                408, f"the body did not arrive within {self._seconds:g} seconds: send it faster."
            )
            await late.response(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body; None if the client disconnected before its end."""
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                raise self._too_large()
            if not message.get("more_body", False):
                return b"".join(parts)

    def _too_large(self) -> HTTPError:
        return HTTPError(
            413,
            f"the body is larger than {self._max_bytes} bytes: send less, or raise "
            "--max-body-bytes.",
            headers={"Connection": "close"},
        )


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body as one message, then what comes on the connection."""
    rest: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return rest.pop() if rest else await receive()

    return replayed
