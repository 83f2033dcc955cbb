"""One line for each request: never a prompt, never a key."""

import logging
import re
import time
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mor.serve.errors import HTTPError

_log = logging.getLogger("mor.serve")

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # of a client's choice
_MAX_PATH = 200


class RequestLog:
    """ASGI middleware: gives each request an id, logs it, and answers for what fails inside."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.num_active = 0
        """Requests whose answers are not sent yet."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = name
        status, began = 0, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        self.num_active += 1
        try:
            await self._app(scope, receive, noted)
        except Exception as error:
            # Its message may quote a prompt, so it stays out of the log.
            trace = "".join(traceback.format_tb(error.__traceback__))
            _log.error("%s failed with %s at\n%s", name, type(error).__name__, trace)
            if not status:
                failed = HTTPError(500, f"the server failed; its log has more under {name}.")
                await failed.response(scope, receive, noted)
        finally:
            self.num_active -= 1
            path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")
            _log.info(
                "%s %s %s %s %.0f ms",
                *(name, scope["method"], path[:_MAX_PATH], status or "-"),
                1000 * (time.monotonic() - began),
            )
