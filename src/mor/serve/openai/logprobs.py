"""Log-probabilities in OpenAI's two shapes."""

import codecs
from collections.abc import Mapping, Sequence

from mor.engine.request import TokenOutput
from mor.model.sampling import Completion
from mor.serve.openai.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from mor.serve.text.prompt_processor import PromptProcessor

_MIN = -9999.0
"""JSON knows no infinity, nor what is no number."""


class CompletionScores:
    """Log-probabilities of one choice of `/v1/completions`, as its tokens come."""

    def __init__(self, codec: PromptProcessor) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, prompt: Completion) -> CompletionLogprobs:
        """Those of the prompt's tokens; nothing precedes the first."""
        tops = prompt.prompt_top_logprobs
        return self._scores(prompt.prompt_token_ids, prompt.prompt_logprobs, tops)

    def output(self, events: Sequence[TokenOutput]) -> CompletionLogprobs:
        """Those of tokens that have come."""
        ids, scores = [e.token_id for e in events], [e.logprob for e in events]
        return self._scores(ids, scores, [e.top_logprobs for e in events])

    def _scores(
        self,
        ids: Sequence[int],
        scores: Sequence[float | None],
        tops: Sequence[Mapping[int, float] | None],
    ) -> CompletionLogprobs:
        offsets: list[int] = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._codec.token_bytes(token)))
        text = self._codec.token_text
        likeliest: list[dict[str, float] | None] = []
        for token, score, top in zip(ids, scores, tops, strict=True):
            if top is None or score is None:
                likeliest.append(None)
                continue
            named: dict[str, float] = {}
            for other, value in {**top, token: score}.items():
                # The likelier of two that are written alike.
                named.setdefault(text(other), max(_MIN, value))
            likeliest.append(named)
        return CompletionLogprobs(
            tokens=list(map(text, ids)),
            token_logprobs=[None if s is None else max(_MIN, s) for s in scores],
            top_logprobs=likeliest,
            text_offset=offsets,
        )


def joined(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """Of some tokens and of those that follow."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def chat_logprobs(codec: PromptProcessor, events: Sequence[TokenOutput]) -> ChatLogprobs:
    """Of tokens that have come, as `/v1/chat/completions` gives them."""

    def of(token: int, score: float) -> TopLogprob:
        data = codec.token_bytes(token)
        return TopLogprob(token=codec.token_text(token), logprob=max(_MIN, score), bytes=list(data))

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **of(event.token_id, event.logprob).model_dump(),
                top_logprobs=[of(token, score) for token, score in event.top_logprobs.items()],
            )
            for event in events
        ]
    )
