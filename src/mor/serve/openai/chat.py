"""`/v1/chat/completions`."""

import time
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mor.engine.request import TokenOutput
from mor.model.sampling import Completion
from mor.serve.errors import json_response
from mor.serve.openai.logprobs import chat_logprobs
from mor.serve.openai.protocol import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Usage,
)
from mor.serve.openai.stream import respond
from mor.serve.openai.usage import compute_usage
from mor.serve.request_stream import RequestStream, group_by_choice
from mor.serve.served_model import ServedModel


async def create_chat_completion(
    service: ServedModel, body: ChatRequest, request: Request
) -> Response:
    """Answer a conversation.

    Raises:
        HTTPError: the request cannot be served.
    """
    service.check_model(body.model)
    prompts = [await service.prompt_processor.encode_messages(body.messages)]
    asked = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = service.params(body, prompts, asked, logprobs=logprobs)
    ticket = await service.engine.submit(prompts, params)
    work = _Chat(service, body, ticket, request.state.id)
    return await respond(service, request, ticket, work.chunks() if body.stream else work.whole())


class _Chat:
    """The answers to one request."""

    def __init__(
        self, service: ServedModel, body: ChatRequest, ticket: RequestStream, name: str
    ) -> None:
        self._service, self._body, self._ticket = service, body, ticket
        self._name, self._created = f"chatcmpl-{name}", int(time.time())
        self._done: list[Completion] = []

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """First the roles, then what is added by each batch of tokens."""
        for number in range(self._body.n):
            delta = ChatDelta(role="assistant", content="")
            yield self._chunk(number, delta, [])
        async for tokens in self._ticket:
            for number, events in group_by_choice(tokens).items():
                delta = ChatDelta(content="".join(event.text for event in events))
                yield self._chunk(number, delta, events)
        if self._body.includes_usage:
            yield self._response([], self._usage())

    async def whole(self) -> Response:
        """The answer."""
        tokens = [pair async for tokens in self._ticket for pair in tokens]
        choices: list[ChatChoice] = []
        for number, events in sorted(group_by_choice(tokens).items()):
            self._note(events)
            reason = events[-1].finish_reason
            assert reason is not None, "a choice is done when its request is"
            choice = ChatChoice(
                index=number,
                message=ChatMessage(content="".join(event.text for event in events)),
                logprobs=self._logprobs(events),
                finish_reason=reason,
                token_ids=[event.token_id for event in events],
                recursion_counts=[event.recursion_count for event in events],
            )
            choices.append(choice)
        response = ChatResponse(
            id=self._name,
            created=self._created,
            model=self._service.name,
            choices=choices,
            usage=self._usage(),
        )
        return json_response(response.model_dump())

    def _chunk(self, number: int, delta: ChatDelta, events: Sequence[TokenOutput]) -> ChatChunk:
        self._note(events)
        choice = ChatChunkChoice(
            index=number,
            delta=delta,
            logprobs=self._logprobs(events) if events else None,
            finish_reason=events[-1].finish_reason if events else None,
            token_ids=[event.token_id for event in events],
            recursion_counts=[event.recursion_count for event in events],
        )
        return self._response([choice])

    def _response(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._name,
            created=self._created,
            model=self._service.name,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, events: Sequence[TokenOutput]) -> ChatLogprobs | None:
        return (
            chat_logprobs(self._service.prompt_processor, events) if self._body.logprobs else None
        )

    def _note(self, events: Sequence[TokenOutput]) -> None:
        self._done += [c for event in events for c in event.completions or ()]

    def _usage(self) -> Usage:
        return compute_usage(self._service.model, self._done, scored=False)
