"""Log-probabilities in OpenAI's two shapes: that of completions and that of chats."""

import codecs
from collections.abc import Mapping, Sequence

from mor.engine.request import TokenOutput
from mor.model.sampling import Completion
from mor.serve.openai.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from mor.serve.text.prompt_processor import PromptProcessor

_MIN = -9999.0
"""Stands for minus infinity, which JSON cannot hold; OpenAI sends the same number."""


class CompletionScores:
    """Log-probabilities of one choice of `/v1/completions`, call by call in the text's order.

    Remembers between calls where in the text the next token begins. Offsets count characters; the
    bytes of a character that several tokens make up count where the last of them is.
    """

    def __init__(self, processor: PromptProcessor) -> None:
        self._processor = processor
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, prompt: Completion) -> CompletionLogprobs:
        """Of the prompt's tokens; the first has none, because nothing precedes it."""
        tops = prompt.prompt_top_logprobs
        return self._scores(prompt.prompt_token_ids, prompt.prompt_logprobs, tops)

    def output(self, outputs: Sequence[TokenOutput]) -> CompletionLogprobs:
        """Of generated tokens."""
        ids = [output.token_id for output in outputs]
        scores = [output.logprob for output in outputs]
        return self._scores(ids, scores, [output.top_logprobs for output in outputs])

    def _scores(
        self,
        ids: Sequence[int],
        scores: Sequence[float | None],
        tops: Sequence[Mapping[int, float] | None],
    ) -> CompletionLogprobs:
        offsets: list[int] = []
        for token in ids:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(self._processor.token_bytes(token)))
        text = self._processor.token_text
        # The chosen token is always listed, even where it is none of the likeliest.
        likeliest: list[dict[str, float] | None] = []
        for token, score, top in zip(ids, scores, tops, strict=True):
            if top is None or score is None:
                likeliest.append(None)
                continue
            named: dict[str, float] = {}
            for other, value in {**top, token: score}.items():
                # Tokens may be written alike; the first, which is the likelier, keeps the key.
                named.setdefault(text(other), max(_MIN, value))
            likeliest.append(named)
        return CompletionLogprobs(
            tokens=list(map(text, ids)),
            token_logprobs=[None if s is None else max(_MIN, s) for s in scores],
            top_logprobs=likeliest,
            text_offset=offsets,
        )


def concat(first: CompletionLogprobs, second: CompletionLogprobs) -> CompletionLogprobs:
    """The entries of both, one after the other."""
    return CompletionLogprobs(
        tokens=first.tokens + second.tokens,
        token_logprobs=first.token_logprobs + second.token_logprobs,
        top_logprobs=first.top_logprobs + second.top_logprobs,
        text_offset=first.text_offset + second.text_offset,
    )


def chat_logprobs(processor: PromptProcessor, outputs: Sequence[TokenOutput]) -> ChatLogprobs:
    """The log-probabilities of generated tokens as `/v1/chat/completions` gives them."""

    def entry(token: int, score: float) -> TopLogprob:
        data = processor.token_bytes(token)
        return TopLogprob(
            token=processor.token_text(token), logprob=max(_MIN, score), bytes=list(data)
        )

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **entry(output.token_id, output.logprob).model_dump(),
                top_logprobs=[entry(token, score) for token, score in output.top_logprobs.items()],
            )
            for output in outputs
        ]
    )
