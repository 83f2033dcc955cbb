"""The process: a socket, signals, and an end that loses nothing."""

import logging
import signal
import socket
import time
from types import FrameType
from typing import Any

import uvicorn

from mor.errors import ConfigError
from mor.serve.app import App
from mor.serve.connection import Connection
from mor.serve.errors import HTTPError

_log = logging.getLogger("mor.serve")

_LAST_WORDS = 5  # seconds for connections to close once nothing is under way


class Server(uvicorn.Server):
    """A server that finishes what it has accepted when it is told to stop.

    The first SIGTERM or SIGINT starts that: new requests get 503, and when the last answer is sent,
    or `drain_timeout` has passed, the server ends. A second signal ends it at once.
    """

    def __init__(self, app: App, **options: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                log_config=None,
                access_log=False,
                server_header=False,
                ws="none",
                lifespan="on",
                timeout_graceful_shutdown=_LAST_WORDS,
                **options,
            )
        )
        self._app = app
        self._asked: float | None = None  # when it was told to stop
        self._is_draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open for requests.

        Raises:
            ConfigError: another process has begun to listen there since `bind`.
        """
        for each in sockets or ():
            _listen(each, self.config.backlog)
        await super().startup(sockets)
        for each in sockets or ():
            host, port = each.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            where = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
            _log.info("%s is served at %s", self._app.service.name, where)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come; what it may interrupt does not bear more than this."""
        if self._asked is not None or sig not in (signal.SIGINT, signal.SIGTERM):
            self.should_exit = self.force_exit = True
        self._asked = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to end; asked ten times a second."""
        if self._asked is None or self.should_exit:
            return await super().on_tick(counter)
        bridge = self._app.service.engine
        if not self._is_draining:
            self._is_draining = True
            bridge.drain()
            _log.info("stopping: %d requests are under way", self._app.num_active)
        if not self._app.num_active:
            return True
        if time.monotonic() < self._asked + self._app.service.config.drain_timeout:
            return await super().on_tick(counter)
        _log.warning("%d requests did not finish in time", self._app.num_active)
        bridge.fail_all(HTTPError(503, "the server stops: try another one."))
        return True


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: it cannot be had.
    """
    listening: socket.socket | None = None
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("ports end at 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if listening is not None:
            listening.close()
        raise ConfigError(
            f"--host={host} --port={port}: nothing can listen there ({error}): choose another."
        ) from error
    return listening


def _listen(bound: socket.socket, backlog: int) -> None:
    """Two processes may bind one port, but only one can listen: the model loads in between."""
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(backlog)
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port}: another server was faster ({error}): choose another."
        ) from error
