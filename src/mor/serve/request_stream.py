"""`RequestStream`: one client's request as requests to the engine, and the tokens of its choices.

Lives on the event loop: `AsyncEngine` pushes tokens there, and a route iterates over them there, so
that nothing here needs a lock.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence

from mor.engine.request import TokenOutput
from mor.model.sampling import SamplingParams
from mor.serve.errors import HTTPError

Prompt = Sequence[int]
ChoiceOutputs = list[tuple[int, TokenOutput]]
"""Tokens in the order in which they came, each with the index of the choice that it continues."""


class RequestStream:
    """A request to the engine for each prompt; iterating over it gives their tokens.

    Each iteration gives all tokens that have come since the last one: a client that reads slowly
    gets more at a time. Choices are numbered as OpenAI does: completion `i` of prompt `p` is choice
    `p * n + i`.

    Args:
        name: starts the ids of the engine's requests.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        self.prompts = prompts
        self.params = params
        self.request_ids = [f"{name}-{index}" for index in range(len(prompts))]
        self.num_sequences = len(prompts) * params.n
        self._prompt_index = {request_id: i for i, request_id in enumerate(self.request_ids)}
        self._unfinished = set(self.request_ids)
        self._pending: ChoiceOutputs = []
        """Tokens that came since the last iteration."""
        self._error: HTTPError | None = None
        self._wake = asyncio.Event()
        self._timeout: asyncio.TimerHandle | None = None

    def expire_after(self, seconds: float) -> None:
        """Fail with 504 if the stream is not closed before."""
        error = HTTPError(504, f"the request took more than {seconds:g} seconds: ask for less.")
        self._timeout = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def push(self, output: TokenOutput) -> None:
        """Take a token that the engine has generated for one of the requests."""
        choice = self._prompt_index[output.request_id] * self.params.n + output.index
        self._pending.append((choice, output))
        if output.completions is not None:  # the request's last token
            self._unfinished.discard(output.request_id)
        self._wake.set()

    def fail(self, error: HTTPError) -> None:
        """End the iteration with an error, unless all tokens have come; the first error counts."""
        self._error = self._error or error
        self._wake.set()

    def close(self) -> None:
        """Stop the clock of `expire_after`: nobody iterates any more."""
        if self._timeout is not None:
            self._timeout.cancel()

    async def __aiter__(self) -> AsyncIterator[ChoiceOutputs]:
        while self._unfinished or self._pending:
            await self._wake.wait()
            self._wake.clear()
            pending, self._pending = self._pending, ChoiceOutputs()
            if pending:
                yield pending
            # After the tokens, so that the client gets all that was generated before the error.
            if self._error is not None and self._unfinished:
                raise self._error


def group_by_choice(outputs: ChoiceOutputs) -> dict[int, list[TokenOutput]]:
    """The tokens of each choice, by its index, in the order in which they came."""
    found: dict[int, list[TokenOutput]] = {}
    for choice, output in outputs:
        found.setdefault(choice, []).append(output)
    return found
