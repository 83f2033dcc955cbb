"""The route `/v1/completions`: completions of prompts, whole or streamed."""

import time
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request
from starlette.responses import Response

from mor.engine.request import TokenOutput
from mor.model.sampling import Completion
from mor.serve.errors import json_response
from mor.serve.openai.logprobs import CompletionScores, concat
from mor.serve.openai.protocol import CompletionChoice, CompletionRequest, CompletionResponse, Usage
from mor.serve.openai.stream import respond
from mor.serve.openai.usage import compute_usage
from mor.serve.request_stream import RequestStream, group_by_choice
from mor.serve.served_model import ServedModel


async def create_completion(
    served_model: ServedModel, body: CompletionRequest, request: Request
) -> Response:
    """Generate `n` completions of each prompt; the response is JSON or an event stream.

    Raises:
        HTTPError: the request cannot be served.
    """
    served_model.check_model(body.model)
    prompts = await served_model.prompt_processor.prompts(body.prompt)
    params = served_model.params(
        body,
        prompts,
        body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.echo and body.logprobs is not None,
    )
    stream = await served_model.engine.submit(prompts, params)
    completions = _Completions(served_model, body, stream, request.state.id)
    work = completions.chunks() if body.stream else completions.whole()
    return await respond(served_model, request, stream, work)


class _Completions:
    """Writes a stream's tokens as OpenAI's completion objects."""

    def __init__(
        self,
        served_model: ServedModel,
        body: CompletionRequest,
        stream: RequestStream,
        request_id: str,
    ) -> None:
        self._served_model = served_model
        self._body = body
        self._stream = stream
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        # `max_tokens=0` only scores the prompt: the token that the engine generates is not shown.
        self._only_scores = body.max_tokens == 0
        self._scores: dict[int, CompletionScores] = {}
        """By choice, because offsets into its text go on from chunk to chunk."""
        self._completions: list[Completion] = []
        """Those of the requests that are finished."""

    async def chunks(self) -> AsyncIterator[CompletionResponse]:
        """A chunk for each batch of a choice's tokens, and at the end the usage if asked for."""
        async for pairs in self._stream:
            for index, outputs in group_by_choice(pairs).items():
                yield self._response([self._choice(index, outputs)])
        if self._body.includes_usage:
            yield self._response([], self._usage())

    async def whole(self) -> Response:
        """One response with all choices, when all tokens have come."""
        collected = [pair async for pairs in self._stream for pair in pairs]
        choices = [
            self._choice(index, outputs) for index, outputs in group_by_choice(collected).items()
        ]
        choices.sort(key=lambda choice: choice.index)
        return json_response(self._response(choices, self._usage()).model_dump())

    def _response(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> CompletionResponse:
        return CompletionResponse(
            id=self._id,
            created=self._created,
            model=self._served_model.name,
            choices=choices,
            usage=usage,
        )

    def _choice(self, index: int, outputs: Sequence[TokenOutput]) -> CompletionChoice:
        """The choice with what these tokens add to it; with its first token also the echo."""
        processor, body = self._served_model.prompt_processor, self._body
        # The completions come with a request's last token; the usage needs them.
        self._completions += [c for output in outputs for c in output.completions or ()]
        shown = () if self._only_scores else outputs
        choice = CompletionChoice(
            index=index,
            text="".join(output.text for output in shown),
            finish_reason=outputs[-1].finish_reason,
            token_ids=[output.token_id for output in shown],
            recursion_counts=[output.recursion_count for output in shown],
        )
        prompt = outputs[0].prompt if body.echo else None  # None after the first token
        if prompt is not None:
            choice.text = self._prompt_text(index, prompt) + choice.text
            choice.prompt_token_ids = prompt.prompt_token_ids
            choice.prompt_recursion_counts = prompt.prompt_recursion_counts
        if body.logprobs is not None:
            scores = self._scores.setdefault(index, CompletionScores(processor))
            # In this order: the text offsets of the output follow those of the prompt.
            echoed = scores.prompt(prompt) if prompt is not None else None
            generated = scores.output(shown)
            choice.logprobs = generated if echoed is None else concat(echoed, generated)
        return choice

    def _prompt_text(self, index: int, prompt: Completion) -> str:
        """The text of a choice's prompt: as the client sent it, or decoded from its token ids."""
        given = self._body.prompt
        if isinstance(given, str):
            return given
        text = given[index // self._body.n]  # choice p * n + i continues prompt p
        if isinstance(text, str):
            return text
        return self._served_model.prompt_processor.decode(prompt.prompt_token_ids)

    def _usage(self) -> Usage:
        return compute_usage(
            self._served_model.model, self._completions, only_scores=self._only_scores
        )
