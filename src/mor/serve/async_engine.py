"""One thread for the engine, asyncio around it.

The engine's thread owns the `LLM`: whatever is to be done with it arrives as a command, in order,
and is done between two ticks. Tokens go back to the loop, in one call for each tick, to the ticket
of the request that they belong to.
"""

import asyncio
import itertools
import logging
import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from mor.engine.llm import LLM
from mor.engine.request import TokenOutput
from mor.errors import MorError
from mor.model.sampling import SamplingParams
from mor.serve.errors import HTTPError, from_engine_error
from mor.serve.metrics import Metrics
from mor.serve.request_stream import Prompt, RequestStream

T = TypeVar("T")

_log = logging.getLogger("mor.serve")

_MAX_FAILURES = 3
"""Ticks in a row that may fail before the engine is given up."""
_MAX_RETRY = 60  # seconds


class AsyncEngine:
    """Requests to the engine, and their tokens back.

    Args:
        llm: the engine; from `start` on nobody else may touch it.
        metrics: told of every tick, in the engine's thread.
        max_waiting: sequences that may wait for a place.
        seconds: after which a request is given up.
    """

    def __init__(self, llm: LLM, metrics: Metrics, *, max_waiting: int, seconds: float) -> None:
        self._llm = llm
        self._metrics = metrics
        self._seconds = seconds
        self._most = llm.config.max_num_seqs + max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._request_streams: dict[
            str, RequestStream
        ] = {}  # by the names of their engine requests
        self._numbers = itertools.count()
        self._active = 0  # sequences of all tickets
        self._is_draining = False
        self._is_broken = False
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="mor-engine", daemon=True)

    # -- on the loop ------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread; called on the loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Fail what is under way, and end the thread."""
        self.fail_all(HTTPError(503, "the server stops: try another one."))
        self._is_draining = True
        self._commands.put(self._stop)
        await asyncio.to_thread(self._thread.join)

    def drain(self) -> None:
        """Take no more requests; those that were accepted go on."""
        self._is_draining = True

    def fail_all(self, error: HTTPError) -> None:
        """End all requests that are under way with an error."""
        for ticket in set(self._request_streams.values()):
            ticket.fail(error)

    def check_admission(self, num_sequences: int = 0) -> None:
        """Refuse what cannot be taken now.

        Raises:
            HTTPError: 503 while the server stops or if its engine is broken; 429 if there is no
                room, 400 if there never is.
        """
        if self._is_broken:
            raise HTTPError(503, "the engine has failed for good: restart the server.")
        if self._is_draining:
            retry = {"Retry-After": "5"}
            raise HTTPError(503, "the server is stopping: try another one.", headers=retry)
        if num_sequences > self._most:
            raise HTTPError(
                400,
                f"{num_sequences} completions in one request, {self._most} are allowed: send "
                "fewer prompts at once, or ask for fewer completions (n).",
            )
        if self._active + num_sequences > self._most:
            rounds = self._active / self._llm.config.max_num_seqs
            seconds = min(max(1, round(rounds * self._metrics.mean_seconds)), _MAX_RETRY)
            raise HTTPError(
                429,
                f"{self._active} completions are under way or waiting, {self._most} are allowed: "
                f"try again in {seconds} s.",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> RequestStream:
        """Hand a client's request to the engine, which has accepted it when this returns.

        `release` must follow, when the client is served or has gone.

        Raises:
            HTTPError: as `check` says, or the engine cannot serve it; then nothing is under way.
        """
        self.check_admission(len(prompts) * params.n)
        ticket = RequestStream(f"http-{next(self._numbers)}", prompts, params)
        self._active += ticket.num_sequences
        self._request_streams.update(dict.fromkeys(ticket.names, ticket))
        try:
            await self.call(lambda llm: self._add(llm, ticket))
        except MorError as error:
            self.release(ticket)
            raise from_engine_error(error) from error
        except BaseException:  # the client has gone: what was added goes, too
            self.release(ticket)
            raise
        ticket.expire_after(self._seconds)
        return ticket

    def release(self, ticket: RequestStream) -> None:
        """Free what the engine still holds for a ticket."""
        for name in ticket.names:
            del self._request_streams[name]
        self._active -= ticket.num_sequences
        ticket.close()
        self._commands.put(lambda: self._abort(ticket.names))

    async def call(self, command: Callable[[LLM], T]) -> T:
        """What a function of the engine returns, called in its thread between two ticks."""
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                result = command(self._llm)
            except Exception as error:
                self._call(_reject, answer, error)
            else:
                self._call(_resolve, answer, result)

        if self._is_broken:
            self.check_admission()
        self._commands.put(run)
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except TimeoutError as error:
            raise HTTPError(504, "the engine is busy and does not answer: try later.") from error

    def _deliver(self, events: list[TokenOutput]) -> None:
        for event in events:
            ticket = self._request_streams.get(event.request_id)
            if ticket is not None:
                ticket.push(event)

    # -- in the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        failures = 0
        while not self._is_stopping:
            self._run_commands()
            try:
                events = self._llm.step()
                self._metrics.record_step(self._llm, events)
            except Exception as error:
                failures += 1
                self._recover(error, failures)
                continue
            failures = 0
            if events:
                self._call(self._deliver, events)
        self._abort(self._metrics.names)

    def _run_commands(self) -> None:
        """Do what has been asked for; wait for it if there is nothing else to do."""
        while True:
            try:
                command = self._commands.get(block=not self._llm.has_unfinished_requests)
            except queue.Empty:
                return
            command()
            if self._is_stopping:
                return

    def _recover(self, error: Exception, failures: int) -> None:
        """Give up what is under way. The message stays out of the log: it may quote a prompt."""
        trace = "".join(traceback.format_tb(error.__traceback__))
        _log.error("a tick failed with %s at\n%s", type(error).__name__, trace)
        if failures >= _MAX_FAILURES:
            self._is_broken = self._is_stopping = True
        for name in self._metrics.names:
            self._llm.abort(name)
            self._metrics.record_end(name)
        failed = HTTPError(500, "the engine failed while it worked on this request: try again.")
        self._call(self.fail_all, failed)

    def _add(self, llm: LLM, ticket: RequestStream) -> None:
        for name, prompt in zip(ticket.names, ticket.prompts, strict=True):
            llm.add_request(prompt, ticket.params, name)
            self._metrics.record_arrival(name, len(prompt))

    def _abort(self, names: list[str]) -> None:
        for name in names:
            self._llm.abort(name)
            self._metrics.record_end(name)

    def _stop(self) -> None:
        self._is_stopping = True

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Have the loop call a function, unless it is over."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _resolve(answer: "asyncio.Future[T]", result: T) -> None:
    if not answer.done():  # its client may have gone
        answer.set_result(result)


def _reject(answer: "asyncio.Future[T]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
