"""`AsyncEngine`: one thread that runs the engine, and asyncio methods that reach it.

Invariants:

- Threads. The engine's thread, and it alone, calls methods of the `LLM` and the `record_*` methods
  of `Metrics`. The event loop's thread, and it alone, touches the `RequestStream`s,
  `_request_streams`, `_num_active`, `_is_draining` and everything of asyncio.
- From the loop to the engine. Functions go through the queue `_commands`. They run in the order
  in which they were put there, and only between two steps of the engine.
- From the engine to the loop. Functions go through `_call_on_loop`, at most one call for each step
  that generated tokens, so that a stream gets its tokens in the engine's order.
- Flags. `_is_stopping` and `_is_broken` are written in the engine's thread. The loop only reads
  `_is_broken`, which changes once, from False to True.
- Life of a stream. `submit` adds it to `_request_streams` before the engine knows its requests,
  and `release`, which must follow exactly once, removes it before the engine forgets them. A token
  whose stream is no longer there is dropped.
- Order. `release` puts its abort behind the command that added the requests, so that a client that
  leaves while its request is being added leaves nothing behind.
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
"""Steps in a row that may fail before the engine is given up."""
_MAX_RETRY_S = 60
"""The longest `Retry-After` that a refused client is told."""


class AsyncEngine:
    """Submits requests to the engine's thread and streams their tokens back to the event loop.

    Args:
        llm: the engine; from `start` on nobody else may touch it.
        metrics: counts every step, in the engine's thread.
        max_waiting: sequences that may wait beyond the engine's `max_num_seqs`; more are refused.
        seconds: after which a request is given up.
    """

    def __init__(self, llm: LLM, metrics: Metrics, *, max_waiting: int, seconds: float) -> None:
        self._llm = llm
        self._metrics = metrics
        self._seconds = seconds
        self._max_sequences = llm.config.max_num_seqs + max_waiting
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._request_streams: dict[str, RequestStream] = {}
        """By the ids of the engine's requests, of which a stream has one for each prompt."""
        self._stream_numbers = itertools.count()
        self._num_active = 0
        """Sequences of all streams that are not released."""
        self._is_draining = False
        self._is_broken = False
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="mor-engine", daemon=True)

    # -- called on the event loop -----------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread, which reports to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Fail the requests that are under way, and wait until the engine's thread has ended."""
        self.fail_all(HTTPError(503, "the server stops: try another one."))
        self._is_draining = True
        self._commands.put(self._stop)
        # In a thread: the engine may be in a step, and its last calls need a loop that runs.
        await asyncio.to_thread(self._thread.join)

    def drain(self) -> None:
        """Refuse new requests from now on; those that were accepted go on."""
        self._is_draining = True

    def fail_all(self, error: HTTPError) -> None:
        """End all requests that are under way with an error."""
        for stream in set(self._request_streams.values()):
            stream.fail(error)

    def check_admission(self, num_sequences: int = 0) -> None:
        """Raise if a request of so many sequences cannot be accepted now.

        Raises:
            HTTPError: 503 while the server stops or if its engine is broken; 429 if there is no
                room, 400 if there never is.
        """
        if self._is_broken:
            raise HTTPError(503, "the engine has failed for good: restart the server.")
        if self._is_draining:
            retry = {"Retry-After": "5"}
            raise HTTPError(503, "the server is stopping: try another one.", headers=retry)
        if num_sequences > self._max_sequences:
            raise HTTPError(
                400,
                f"{num_sequences} completions in one request, {self._max_sequences} are allowed: "
                "send fewer prompts at once, or ask for fewer completions (n).",
            )
        if self._num_active + num_sequences > self._max_sequences:
            # All that is active takes so many full batches, each about a mean request's time.
            batches = self._num_active / self._llm.config.max_num_seqs
            seconds = min(max(1, round(batches * self._metrics.mean_seconds)), _MAX_RETRY_S)
            raise HTTPError(
                429,
                f"{self._num_active} completions are under way or waiting, {self._max_sequences} "
                f"are allowed: try again in {seconds} s.",
                code="queue_full",
                headers={"Retry-After": str(seconds)},
            )

    async def submit(self, prompts: Sequence[Prompt], params: SamplingParams) -> RequestStream:
        """Hand a client's request to the engine, which has accepted it when this returns.

        `release` must follow, when the client is served or has gone.

        Raises:
            HTTPError: as for `check_admission`, or the engine cannot serve it; nothing is under way
                then.
        """
        self.check_admission(len(prompts) * params.n)
        stream = RequestStream(f"http-{next(self._stream_numbers)}", prompts, params)
        # Counted before the first await: otherwise two clients could take the last place.
        self._num_active += stream.num_sequences
        self._request_streams.update(dict.fromkeys(stream.request_ids, stream))
        try:
            await self.call(lambda llm: self._add(llm, stream))
        except MorError as error:
            self.release(stream)  # an earlier prompt of the request may already be in the engine
            raise from_engine_error(error) from error
        except BaseException:  # also a cancellation: the client left while it was being added
            self.release(stream)
            raise
        stream.expire_after(self._seconds)
        return stream

    def release(self, stream: RequestStream) -> None:
        """Forget a stream, and abort what the engine still does for it."""
        for request_id in stream.request_ids:
            del self._request_streams[request_id]
        self._num_active -= stream.num_sequences
        stream.close()
        self._commands.put(lambda: self._abort(stream.request_ids))

    async def call(self, command: Callable[[LLM], T]) -> T:
        """Run a function of the `LLM` in the engine's thread between two steps; its result.

        Raises:
            HTTPError: 503 if the engine is broken, 504 if it does not get to it in time.
            Exception: whatever the function raises.
        """
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def run() -> None:
            try:
                result = command(self._llm)
            except Exception as error:
                self._call_on_loop(_reject, answer, error)
            else:
                self._call_on_loop(_resolve, answer, result)

        if self._is_broken:  # its thread has ended: nobody would run the command
            self.check_admission()
        self._commands.put(run)
        try:
            async with asyncio.timeout(self._seconds):
                return await answer
        except TimeoutError as error:
            raise HTTPError(504, "the engine is busy and does not answer: try later.") from error

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        """Push one step's tokens to their streams."""
        for output in outputs:
            stream = self._request_streams.get(output.request_id)
            if stream is not None:  # otherwise its client has gone, and the abort is on its way
                stream.push(output)

    # -- in the engine's thread -------------------------------------------------------------------

    def _run(self) -> None:
        """Alternate between commands and steps of the engine until `_is_stopping`."""
        failures = 0  # in a row
        while not self._is_stopping:
            self._run_commands()
            try:
                # After a stop command there may be nothing to do: a step without requests is none.
                outputs = self._llm.step()
                self._metrics.record_step(self._llm, outputs)
            except Exception as error:
                failures += 1
                self._recover(error, failures)
                continue
            failures = 0
            if outputs:
                self._call_on_loop(self._deliver, outputs)
        self._abort(self._metrics.request_ids)

    def _run_commands(self) -> None:
        """Run the commands in the queue; while the engine has no request, wait for more."""
        while True:
            try:
                command = self._commands.get(block=not self._llm.has_unfinished_requests)
            except queue.Empty:
                return
            command()
            if self._is_stopping:
                return

    def _recover(self, error: Exception, failures: int) -> None:
        """Abort all requests after a failed step; give the engine up after too many in a row."""
        # Places in the source only: the error's message may quote a prompt.
        trace = "".join(traceback.format_tb(error.__traceback__))
        _log.error("a step failed with %s at\n%s", type(error).__name__, trace)
        if failures >= _MAX_FAILURES:
            self._is_broken = self._is_stopping = True
        # Which request made the step fail is not known, so that none can go on.
        self._abort(self._metrics.request_ids)
        failed = HTTPError(500, "the engine failed while it worked on this request: try again.")
        self._call_on_loop(self.fail_all, failed)

    def _add(self, llm: LLM, stream: RequestStream) -> None:
        """Give the engine a request for each prompt of a stream."""
        for request_id, prompt in zip(stream.request_ids, stream.prompts, strict=True):
            llm.add_request(prompt, stream.params, request_id)
            self._metrics.record_arrival(request_id, len(prompt))

    def _abort(self, request_ids: list[str]) -> None:
        """End requests of the engine; those that it does not know, or has finished, are skipped."""
        for request_id in request_ids:
            self._llm.abort(request_id)
            self._metrics.record_end(request_id)

    def _stop(self) -> None:
        self._is_stopping = True

    def _call_on_loop(self, function: Callable[..., None], *args: Any) -> None:
        """Have the event loop call a function soon, unless the loop is closed."""
        assert self._loop is not None
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)


def _resolve(answer: "asyncio.Future[T]", result: T) -> None:
    if not answer.done():  # it is done if its client has gone: then it was cancelled
        answer.set_result(result)


def _reject(answer: "asyncio.Future[T]", error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)
