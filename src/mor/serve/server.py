"""`Server`: uvicorn with a graceful end; and `bind`, the socket that it listens on."""

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

_CLOSE_TIMEOUT_S = 5  # for connections to close once no request is under way


class Server(uvicorn.Server):
    """A server that finishes the requests it has accepted before it ends.

    The first SIGTERM or SIGINT starts the drain: new requests get 503, and when the last response
    is sent, or `drain_timeout` has passed, the server ends. A second signal ends it at once.

    Args:
        options: further settings of `uvicorn.Config`.
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
                timeout_graceful_shutdown=_CLOSE_TIMEOUT_S,
                **options,
            )
        )
        self._app = app
        self._stop_time: float | None = None  # of the first signal, by `time.monotonic`
        self._is_draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on the sockets and log their addresses.

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
            _log.info("%s is served at %s", self._app.served_model.name, where)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note the time of a first signal; end at once on a second one.

        Runs in the middle of whatever the signal interrupts, so that it only sets values; `on_tick`
        acts on them.
        """
        if self._stop_time is not None or sig not in (signal.SIGINT, signal.SIGTERM):
            self.should_exit = self.force_exit = True
        self._stop_time = time.monotonic()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end now; uvicorn calls this ten times a second."""
        if self._stop_time is None or self.should_exit:
            return await super().on_tick(counter)
        engine = self._app.served_model.engine
        if not self._is_draining:
            self._is_draining = True
            engine.drain()
            _log.info("stopping: %d requests are under way", self._app.num_active)
        if not self._app.num_active:
            return True
        if time.monotonic() < self._stop_time + self._app.served_model.config.drain_timeout:
            return await super().on_tick(counter)
        _log.warning("%d requests did not finish in time", self._app.num_active)
        engine.fail_all(HTTPError(503, "the server stops: try another one."))
        return True


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not listening yet; port 0 takes a free one.

    Raises:
        ConfigError: there is no such address, or it is taken.
    """
    bound: socket.socket | None = None
    try:
        if not 0 <= port < 2**16:
            raise OverflowError("ports end at 65535")
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"--host={host} --port={port}: nothing can listen there ({error}): choose another."
        ) from error
    return bound


def _listen(bound: socket.socket, backlog: int) -> None:
    """Start to listen; two processes may bind one port, but only one of them can listen.

    Raises:
        ConfigError: the other one did, while our model was loading.
    """
    host, port = bound.getsockname()[:2]
    try:
        bound.listen(backlog)
    except OSError as error:
        raise ConfigError(
            f"--host={host} --port={port}: another server was faster ({error}): choose another."
        ) from error
