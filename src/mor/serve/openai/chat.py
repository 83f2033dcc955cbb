"""The route `/v1/chat/completions`: answers to a conversation, whole or streamed."""

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
    served_model: ServedModel, body: ChatRequest, request: Request
) -> Response:
    """Generate `n` answers to a conversation; the response is JSON or an event stream.

    Raises:
        HTTPError: the request cannot be served.
    """
    served_model.check_model(body.model)
    prompts = [await served_model.prompt_processor.encode_messages(body.messages)]
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    params = served_model.params(body, prompts, max_tokens, logprobs=logprobs)
    stream = await served_model.engine.submit(prompts, params)
    chat = _ChatAnswers(served_model, body, stream, request.state.id)
    work = chat.chunks() if body.stream else chat.whole()
    return await respond(served_model, request, stream, work)


class _ChatAnswers:
    """Writes a stream's tokens as OpenAI's chat objects."""

    def __init__(
        self, served_model: ServedModel, body: ChatRequest, stream: RequestStream, request_id: str
    ) -> None:
        self._served_model = served_model
        self._body = body
        self._stream = stream
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        self._completions: list[Completion] = []
        """Those of the requests that are finished."""

    async def chunks(self) -> AsyncIterator[ChatChunk]:
        """For each answer a chunk with the role, then one for each batch of its tokens."""
        for index in range(self._body.n):
            delta = ChatDelta(role="assistant", content="")
            yield self._chunk(index, delta, [])
        async for pairs in self._stream:
            for index, outputs in group_by_choice(pairs).items():
                delta = ChatDelta(content="".join(output.text for output in outputs))
                yield self._chunk(index, delta, outputs)
        if self._body.includes_usage:
            yield self._response([], self._usage())

    async def whole(self) -> Response:
        """One response with all answers, when all tokens have come."""
        collected = [pair async for pairs in self._stream for pair in pairs]
        choices: list[ChatChoice] = []
        for index, outputs in sorted(group_by_choice(collected).items()):
            self._collect(outputs)
            reason = outputs[-1].finish_reason
            assert reason is not None, "a choice is done when its request is"
            choice = ChatChoice(
                index=index,
                message=ChatMessage(content="".join(output.text for output in outputs)),
                logprobs=self._logprobs(outputs),
                finish_reason=reason,
                token_ids=[output.token_id for output in outputs],
                recursion_counts=[output.recursion_count for output in outputs],
            )
            choices.append(choice)
        response = ChatResponse(
            id=self._id,
            created=self._created,
            model=self._served_model.name,
            choices=choices,
            usage=self._usage(),
        )
        return json_response(response.model_dump())

    def _chunk(self, index: int, delta: ChatDelta, outputs: Sequence[TokenOutput]) -> ChatChunk:
        self._collect(outputs)
        choice = ChatChunkChoice(
            index=index,
            delta=delta,
            logprobs=self._logprobs(outputs) if outputs else None,
            finish_reason=outputs[-1].finish_reason if outputs else None,
            token_ids=[output.token_id for output in outputs],
            recursion_counts=[output.recursion_count for output in outputs],
        )
        return self._response([choice])

    def _response(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            created=self._created,
            model=self._served_model.name,
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, outputs: Sequence[TokenOutput]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(self._served_model.prompt_processor, outputs)

    def _collect(self, outputs: Sequence[TokenOutput]) -> None:
        """Keep the completions that come with a request's last token; the usage needs them."""
        self._completions += [c for output in outputs for c in output.completions or ()]

    def _usage(self) -> Usage:
        return compute_usage(self._served_model.model, self._completions, only_scores=False)
