"""`/v1/completions`."""

import time
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mor.engine.request import TokenOutput
from mor.model.sampling import Completion
from mor.serve.errors import json_response
from mor.serve.openai.logprobs import CompletionScores, joined
from mor.serve.openai.protocol import CompletionChoice, CompletionRequest, CompletionResponse, Usage
from mor.serve.openai.stream import respond
from mor.serve.openai.usage import compute_usage
from mor.serve.request_stream import RequestStream, group_by_choice
from mor.serve.served_model import ServedModel


async def create_completion(
    service: ServedModel, body: CompletionRequest, request: Request
) -> Response:
    """Continue prompts.

    Raises:
        HTTPError: the request cannot be served.
    """
    service.check_model(body.model)
    prompts = await service.prompt_processor.prompts(body.prompt)
    params = service.params(
        body,
        prompts,
        body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.echo and body.logprobs is not None,
    )
    ticket = await service.engine.submit(prompts, params)
    work = _Completions(service, body, ticket, request.state.id)
    return await respond(service, request, ticket, work.chunks() if body.stream else work.whole())


class _Completions:
    """The choices of one request."""

    def __init__(
        self, service: ServedModel, body: CompletionRequest, ticket: RequestStream, name: str
    ) -> None:
        self._service, self._body, self._ticket = service, body, ticket
        self._name, self._created = f"cmpl-{name}", int(time.time())
        self._scored = body.max_tokens == 0
        self._scores: dict[int, CompletionScores] = {}
        self._done: list[Completion] = []

    async def chunks(self) -> AsyncIterator[CompletionResponse]:
        """What is added by each batch of tokens."""
        async for tokens in self._ticket:
            for number, events in group_by_choice(tokens).items():
                yield self._response([self._choice(number, events)])
        if self._body.includes_usage:
            yield self._response([], self._usage())

    async def whole(self) -> Response:
        """The answer."""
        tokens = [pair async for tokens in self._ticket for pair in tokens]
        choices = [
            self._choice(number, events) for number, events in group_by_choice(tokens).items()
        ]
        choices.sort(key=lambda choice: choice.index)
        return json_response(self._response(choices, self._usage()).model_dump())

    def _response(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self._name,
            created=self._created,
            model=self._service.name,
            choices=choices,
            usage=usage,
        )

    def _choice(self, number: int, events: Sequence[TokenOutput]) -> CompletionChoice:
        """What these tokens add to a choice; its first one brings the prompt along."""
        codec, body = self._service.prompt_processor, self._body
        self._done += [c for event in events for c in event.completions or ()]
        shown = events[: 0 if self._scored else None]
        choice = CompletionChoice(
            index=number,
            text="".join(event.text for event in shown),
            finish_reason=events[-1].finish_reason,
            token_ids=[event.token_id for event in shown],
            recursion_counts=[event.recursion_count for event in shown],
        )
        prompt = events[0].prompt if body.echo else None
        if prompt is not None:
            choice.text = self._prompt_text(number, prompt) + choice.text
            choice.prompt_token_ids = prompt.prompt_token_ids
            choice.prompt_recursion_counts = prompt.prompt_recursion_counts
        if body.logprobs is not None:
            scores = self._scores.setdefault(number, CompletionScores(codec))
            first = scores.prompt(prompt) if prompt is not None else None
            rest = scores.output(shown)
            choice.logprobs = rest if first is None else joined(first, rest)
        return choice

    def _prompt_text(self, number: int, prompt: Completion) -> str:
        given = self._body.prompt
        if isinstance(given, str):
            return given
        text = given[number // self._body.n]
        if isinstance(text, str):
            return text
        return self._service.prompt_processor.decode(prompt.prompt_token_ids)

    def _usage(self) -> Usage:
        return compute_usage(self._service.model, self._done, scored=self._scored)
