"""Log-likelihoods of continuations after contexts, which multiple-choice benchmarks compare.

`EngineScorer` routes by the causal `threshold` rule, as generation does, on the engine. A context
that several continuations share is computed once: the first continuation is scored one wave before
the others, which find the context in the prefix cache. `TopkScorer` selects by `topk` of the whole
sequence, as the paper's evaluation does; that looks at later tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from mor.engine.llm import LLM
from mor.errors import RequestError
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel

_WAVE_TOKENS = 8192  # of requests scored together: few enough for the prefix cache to hold them
_TOPK_TOKENS = 4096  # in one forward pass


class LoglikelihoodRequest(NamedTuple):
    """Token ids of a context and of the continuation whose log-likelihood is asked for.

    lm-eval calls a request of this kind `loglikelihood`. Neither part may be empty.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """Log-likelihood of a continuation, and whether greedy decoding generates it."""

    logprob: float
    """Sum over its tokens, in nats."""
    is_greedy: bool
    """Whether each token is the likeliest after those before it."""


@runtime_checkable
class Scorer(Protocol):
    """A model that scores continuations and generates text: all that an evaluation calls."""

    max_length: int
    """Tokens of context and continuation together; longer contexts are cut from the left."""

    def score(
        self, pairs: Sequence[LoglikelihoodRequest], done: Callable[[int], None]
    ) -> list[Score]:
        """The score of each pair, in the order of the pairs.

        Args:
            done: called with the number of pairs that each batch finished.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[str]:
        """The text generated after each prompt (token ids), with the params of the same index."""
        ...


def truncate_context(pair: LoglikelihoodRequest, max_length: int) -> LoglikelihoodRequest:
    """The pair with its context cut from the left so that both parts fit in `max_length`.

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


class EngineScorer(Scorer):
    """Scores and generates on the engine, routed by `threshold`."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.max_length = llm.model_config.max_position_embeddings - 1  # one more token is sampled
        self._min_cached = llm.config.block_size  # shorter contexts fill no page to be shared

    def score(
        self, pairs: Sequence[LoglikelihoodRequest], done: Callable[[int], None]
    ) -> list[Score]:
        pairs = [truncate_context(pair, self.max_length) for pair in pairs]
        scores: dict[int, Score] = {}
        for wave in self._waves(pairs):
            prompts = [[*pairs[i].context, *pairs[i].continuation] for i in wave]
            # Only log-probabilities from the continuation on are asked for.
            params = [_scoring_params(len(pairs[i].context)) for i in wave]
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
        """Indices of pairs to score together: the first of new contexts, the rest of earlier ones.

        Contexts come in the order of their tokens, so that those with a common prefix are near.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(range(len(pairs)), key=lambda i: pairs[i]):
            groups.setdefault(pairs[i].context, []).append(i)
        wave: list[int] = []
        behind: list[int] = []  # whose context the current wave computes
        tokens = 0
        for context, members in groups.items():
            ahead = 1 if len(context) >= self._min_cached else len(members)
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
        return [completion.text for completion in self.llm.generate(prompts, params)]


def _scoring_params(first: int) -> SamplingParams:
    """Params that give the log-probabilities of the prompt's tokens from index `first` on."""
    return SamplingParams(
        max_tokens=1, ignore_eos=True, logprobs=1, prompt_logprobs=True, prompt_logprobs_from=first
    )


class TopkScorer(Scorer):
    """Scores with `topk` selection over each sequence; sequences of one length share a batch."""

    def __init__(self, model: MoRModel) -> None:
        self.model = model
        self.max_length = model.config.max_position_embeddings

    @torch.inference_mode()
    def score(
        self, pairs: Sequence[LoglikelihoodRequest], done: Callable[[int], None]
    ) -> list[Score]:
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
                # The last token is only predicted; nothing of it enters the model.
                hidden, _, _ = self.model.hidden_states(ids[:, :-1], "topk")
                hidden = hidden.view(len(batch), length - 1, -1)
                for i, states, row in zip(batch, hidden, ids, strict=True):
                    scores[i] = self._score(states, row, len(pairs[i].continuation))
                done(len(batch))
        return [scores[i] for i in range(len(pairs))]

    def _score(self, states: Tensor, ids: Tensor, num: int) -> Score:
        """Score of the last `num` of (T,) ids, from the (T - 1, E) states before them."""
        logprobs = self.model.compute_logits(states[-num:]).float().log_softmax(-1)
        wanted = ids[-num:]
        total = logprobs.gather(1, wanted[:, None]).sum()
        return Score(float(total), bool((logprobs.argmax(-1) == wanted).all()))

    def generate(
        self, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[str]:
        """Raise RequestError: `topk` looks at later tokens, so no text can be generated with it."""
        raise RequestError(
            f"selection='topk' cannot generate (params of {len(params)} prompts given): it looks "
            "at the whole sequence; use selection='threshold'."
        )
