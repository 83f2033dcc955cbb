"""`RequestStream`: what one client's request is to the engine, and the tokens that came for it."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from mor.engine.request import TokenOutput
from mor.model.sampling import SamplingParams
from mor.serve.errors import HTTPError

Prompt = Sequence[int]
Tokens = list[tuple[int, TokenOutput]]
"""Choices and their tokens."""


class RequestStream:
    """A request to the engine for each prompt; iterating gives the tokens, as many as have come.

    A client that reads slowly gets more tokens at a time. Lives on the event loop.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        self.prompts = prompts
        self.params = params
        self.names = [f"{name}-{number}" for number in range(len(prompts))]
        self.num_sequences = len(prompts) * params.n
        self._numbers = {name: number for number, name in enumerate(self.names)}
        self._unfinished = set(self.names)
        self._tokens: Tokens = []
        self._error: HTTPError | None = None
        self._wake = asyncio.Event()
        self._timeout: asyncio.TimerHandle | None = None

    def expire_after(self, seconds: float) -> None:
        """Fail if it takes longer."""
        error = HTTPError(504, f"the request took more than {seconds:g} seconds: ask for less.")
        self._timeout = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    def push(self, event: TokenOutput) -> None:
        """A token has come."""
        choice = self._numbers[event.request_id] * self.params.n + event.index
        self._tokens.append((choice, event))
        if event.completions is not None:
            self._unfinished.discard(event.request_id)
        self._wake.set()

    def fail(self, error: HTTPError) -> None:
        """Nothing more will come."""
        self._error = self._error or error
        self._wake.set()

    def close(self) -> None:
        """Nobody listens any more."""
        if self._timeout is not None:
            self._timeout.cancel()

    async def __aiter__(self) -> AsyncIterator[Tokens]:
        while self._unfinished or self._tokens:
            await self._wake.wait()
            self._wake.clear()
            tokens, self._tokens = self._tokens, list[tuple[int, TokenOutput]]()
            if tokens:
                yield tokens
            if self._error is not None and self._unfinished:
                raise self._error


def group_by_choice(tokens: Tokens) -> dict[int, list[TokenOutput]]:
    """The tokens of each choice."""
    found: dict[int, list[TokenOutput]] = {}
    for choice, event in tokens:
        found.setdefault(choice, []).append(event)
    return found
