"""`RequestLog`: ASGI middleware that logs a line for each request: no prompt, no key."""

import logging
import re
import time
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.serve.errors import HTTPError

_log = logging.getLogger("mor.serve")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # what a client may send as `x-request-id`
_MAX_PATH = 200


class RequestLog:
    """Gives each request an id, logs it when it ends, and answers 500 if the application raises.

    The id is the client's `x-request-id`, or a random one; it is in `request.state.id`, in the
    response's `x-request-id`, and first in the log line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.num_active = 0
        """Requests whose responses have not been sent completely."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and log it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = request_id
        status, began = 0, time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        self.num_active += 1
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            # Its message may quote a prompt, so it stays out of the log.
            trace = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s failed with %s at\n%s", request_id, type(error).__name__, trace)
            if not status:  # otherwise the response has begun, and can only break off
                failed = HTTPError(500, f"the server failed; its log has more under {request_id}.")
                await failed.response(scope, receive, send_with_id)
        finally:
            self.num_active -= 1
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            _log.info(
                "%s %s %s %s %.0f ms",
                request_id,
                scope["method"],
                path[:_MAX_PATH],
                status or "-",
                1000 * (time.monotonic() - began),
            )
