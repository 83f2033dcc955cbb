"""Connections that do not wait for ever: a request's head has to arrive in time."""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_SECONDS = 20.0


class Connection(H11Protocol):
    """uvicorn's connection; without this it waits for a head, once begun, as long as it takes."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Part of a request has come."""
        super().data_received(data)
        if not self._awaits_head:
            self._stop_waiting()
        elif self._patience is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def _awaits_head(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _wait(self) -> None:
        self._patience = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if self._awaits_head:
            self.transport.close()
