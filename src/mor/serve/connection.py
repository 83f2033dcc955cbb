"""`Connection`: an HTTP/1.1 connection that closes if a request's head does not arrive in time."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_TIMEOUT_S = 20.0


class Connection(H11Protocol):
    """uvicorn's connection with a timeout from its opening to the end of the first request's head.

    The same holds from the first byte of each later request on. uvicorn's own timeout covers only
    connections that are idle between two requests: a client could hold one open for ever by sending
    half a head.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer: the client has just connected."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Parse what came; stop the timer if a head is complete, start it if one has begun."""
        super().data_received(data)
        if not self._awaits_head:
            self._stop_timer()
        elif self._head_timer is None:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer: the connection is closed."""
        self._stop_timer()
        super().connection_lost(exc)

    @property
    def _awaits_head(self) -> bool:
        # `cycle` is uvicorn's request and response in progress; it is set when a head is complete.
        return self.cycle is None or self.cycle.response_complete

    def _start_timer(self) -> None:
        self._head_timer = self.loop.call_later(_HEAD_TIMEOUT_S, self._close_if_waiting)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _close_if_waiting(self) -> None:
        self._head_timer = None
        if self._awaits_head:
            self.transport.close()
