"""Log-likelihoods of continuations after contexts, many at a time: what benchmarks ask a model for.

`EngineScorer` is what a user gets: threshold routing, on the engine. Contexts that several
continuations share are computed once: the first continuation of each goes ahead, the others find
the context in the prefix cache one wave later. `TopkScorer` selects over the whole sequence, which
looks ahead: what the paper reports.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from mor.engine.llm import LLM
from mor.errors import RequestError
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel

_WAVE_TOKENS = 8192  # of contexts that are started together, so that the cache still holds them
_TOPK_TOKENS = 4096  # in one forward pass


class LoglikelihoodRequest(NamedTuple):
    """A continuation after a context, both as token ids and neither empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """Log-likelihood of a continuation in nats, and whether greedy decoding would say it."""

    logprob: float
    is_greedy: bool


@runtime_checkable
class Scorer(Protocol):
    """What an evaluation needs from a model."""

    max_length: int
    """Tokens of context and continuation together; longer ones lose the context's beginning."""

    def score(
        self, pairs: Sequence[LoglikelihoodRequest], done: Callable[[int], None]
    ) -> list[Score]:
        """Score of every pair, in their order; `finish_tile` hears how many more are finished."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[str]:
        """Text after every prompt."""
        ...


def truncate_context(pair: LoglikelihoodRequest, max_length: int) -> LoglikelihoodRequest:
    """The pair with its context shortened from the left so that both fit.

    Raises:
        RequestError: the continuation alone is too long, or one of them is empty.
    """
    context, continuation = pair
    if not context or not continuation:
        raise RequestError("a continuation cannot be scored: it or its context has no tokens.")
    room = max_length - len(continuation)
    if room < 1:
        raise RequestError(
            f"a continuation of {len(continuation)} tokens does not fit this model: with at least "
            f"one token of context it takes {max_length}."
        )
    return LoglikelihoodRequest(context[-room:], continuation)


class EngineScorer:
    """Scores and generates on the engine."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.max_length = llm.model_config.max_position_embeddings - 1  # one more token is sampled
        self._shared = llm.config.block_size  # a shorter context is in no cache

    def score(
        self, pairs: Sequence[LoglikelihoodRequest], done: Callable[[int], None]
    ) -> list[Score]:
        """See `Scorer.score`."""
        pairs = [truncate_context(pair, self.max_length) for pair in pairs]
        scores: dict[int, Score] = {}
        for wave in self._waves(pairs):
            prompts = [[*pairs[i].context, *pairs[i].continuation] for i in wave]
            params = [_scoring(len(pairs[i].context)) for i in wave]
            for i, completion in zip(wave, self.llm.generate(prompts, params), strict=True):
                first = len(pairs[i].context)
                logprobs = completion.prompt_logprobs[first:]
                tops = completion.prompt_top_logprobs[first:]
                likeliest = zip(tops, pairs[i].continuation, strict=True)
                scores[i] = Score(
                    sum(logprob for logprob in logprobs if logprob is not None),
                    all(top is not None and token in top for top, token in likeliest),
                )
            done(len(wave))
        return [scores[i] for i in range(len(pairs))]

    def _waves(self, pairs: Sequence[LoglikelihoodRequest]) -> Iterator[list[int]]:
        """Pairs to be scored together: the first ones of some contexts, the others of those before.

        Contexts are taken in the order of their tokens, so that common beginnings are neighbors.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(range(len(pairs)), key=lambda i: pairs[i]):
            groups.setdefault(pairs[i].context, []).append(i)
        wave: list[int] = []
        behind: list[int] = []
        tokens = 0
        for context, members in groups.items():
            ahead = 1 if len(context) >= self._shared else len(members)
            wave += members[:ahead]
            behind += members[ahead:]
            tokens += sum(len(context) + len(pairs[i].continuation) for i in members[:ahead])
            if tokens >= _WAVE_TOKENS:
                yield wave
                wave, tokens = behind, 0
                behind = list[int]()
        if wave:
            yield wave
        if behind:
            yield behind

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[str]:
        """See `Scorer.generate`."""
        return [completion.text for completion in self.llm.generate(prompts, params)]


def _scoring(first: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=1, ignore_eos=True, logprobs=1, prompt_logprobs=True, prompt_logprobs_from=first
    )


class TopkScorer:
    """Scores with `topk` selection over the whole sequence; sequences of a length share a batch."""

    def __init__(self, model: MoRModel) -> None:
        self.model = model
        self.max_length = model.config.max_position_embeddings

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[LoglikelihoodRequest], done: Callable[[int], None]
    ) -> list[Score]:
        """See `Scorer.score`; the model reads all tokens but the last."""
        pairs = [truncate_context(pair, self.max_length) for pair in pairs]
        scores: dict[int, Score] = {}
        lengths: dict[int, list[int]] = {}
        for i, pair in enumerate(pairs):
            lengths.setdefault(len(pair.context) + len(pair.continuation), []).append(i)
        for length, members in sorted(lengths.items()):
            size = max(1, _TOPK_TOKENS // length)
            for start in range(0, len(members), size):
                batch = members[start : start + size]
                device = self.model.embed_tokens.weight.device
                rows = [[*pairs[i].context, *pairs[i].continuation] for i in batch]
                ids = torch.tensor(rows, device=device)
                hidden, _, _ = self.model.hidden_states(ids[:, :-1], "topk")
                hidden = hidden.view(len(batch), length - 1, -1)
                for i, states, row in zip(batch, hidden, ids, strict=True):
                    scores[i] = self._score(states, row, len(pairs[i].continuation))
                done(len(batch))
        return [scores[i] for i in range(len(pairs))]

    def _score(self, states: Tensor, ids: Tensor, num: int) -> Score:
        logprobs = self.model.compute_logits(states[-num:]).float().log_softmax(-1)
        wanted = ids[-num:]
        total = logprobs.gather(1, wanted[:, None]).sum()
        return Score(float(total), bool((logprobs.argmax(-1) == wanted).all()))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[str]:
        """Raises RequestError: the rule looks ahead, so no text can be generated with it."""
        raise RequestError(
            f"selection='topk' cannot generate (params of {len(params)} prompts given): it looks "
            "at the whole sequence; use selection='threshold'."
        )
