"""What a user asks of generation, and what comes back: plain data, without torch.

The rules that every generator shares live here, so that the reference generator and the engine
cannot drift apart: which tokens end a request, where its random numbers come from, how many
recursions its tokens may take, and which requests a model cannot serve.

The next token is chosen from one position's logits in this order (that of Hugging Face; vLLM has
min_p before top_k, which matters only for the share that top_p is taken of):

1. penalties: repetition over prompt and output, presence and frequency over the output alone;
2. ids that must not come yet (`min_tokens`) get -inf;
3. temperature 0 takes the likeliest id (the first of equals) and is done; otherwise the logits are
   divided by it, and each id has the weight exp(logit - largest logit);
4. top_k, then top_p of what is left, then min_p; ids of equal weight stay or go together;
5. inverse CDF: with one uniform u in [0, 1), the first id, in the order of ids, at which the sum of
   the kept weights exceeds u times their total.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from mor.errors import RequestError
from mor.model.config import MoRConfig
from mor.validation import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Range,
    Rule,
    check_fields,
    float_fields,
)

FinishReason = Literal["stop", "length", "abort"]

MAX_LOGPROBS = 20
"""Tokens that a request can have reported beside the chosen one."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when a request ends.

    Raises:
        RequestError: a value has the wrong type or is out of its range.
    """

    __no_type_check__ = True  # values come from users: __post_init__ checks them

    max_tokens: PositiveInt = 64
    """Tokens to generate, at most."""
    min_tokens: NonNegativeInt = 0
    """Until so many tokens are there, none that would end the request can come."""
    temperature: NonNegativeFloat = 0.0
    """Divides the logits; 0 is greedy."""
    top_k: NonNegativeInt = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: Annotated[float, Range(gt=0, le=1)] = 1.0
    """Keep the likeliest tokens that together hold this share of the probability."""
    min_p: Annotated[float, Range(ge=0, le=1)] = 0.0
    """Drop tokens with less than this share of the likeliest token's probability."""
    repetition_penalty: Annotated[float, Range(ge=0.01, le=100)] = 1.0
    """For tokens in prompt or output, a positive logit is divided by it, another multiplied."""
    presence_penalty: Annotated[float, Range(ge=-2, le=2)] = 0.0
    """Taken from the logit of every token in the output."""
    frequency_penalty: Annotated[float, Range(ge=-2, le=2)] = 0.0
    """Taken from a token's logit once for each time that it is in the output."""
    seed: Annotated[int, Range(ge=0, lt=2**63)] | None = None
    """Seed of this request's own random numbers. None: one is drawn."""
    n: Annotated[int, Range(ge=1, le=1024)] = 1
    """Completions of each prompt; number i, from 0, has the seed `seed + i`."""
    stop: Annotated[
        tuple[str, ...],
        Rule("a text or a list of texts, none of them empty", all),  # an empty text is false
    ] = ()
    """Texts that end the request; a list or a single text will do. They need a tokenizer."""
    stop_token_ids: Annotated[tuple[NonNegativeInt, ...], Rule("a list of token ids")] = ()
    """Tokens that end the request, like the model's `eos_token_id`; part of the output."""
    ignore_eos: bool = False
    """Go on after the model's `eos_token_id`."""
    logprobs: Annotated[int, Range(ge=0, le=MAX_LOGPROBS)] | None = None
    """Report so many of the likeliest tokens beside each chosen one. None: nothing is reported."""
    prompt_logprobs: bool = False
    """Report the log-probability of each token of the prompt, and the likeliest with `logprobs`."""
    prompt_logprobs_from: PositiveInt = 1
    """The first position that `prompt_logprobs` is about: None before it. What comes before may be
    taken from the prefix cache."""
    min_recursions: PositiveInt | None = None
    """Passes of the block that every token takes, at least; those of the prompt, too."""
    max_recursions: PositiveInt | None = None
    """Passes of the block that a token takes, at most. The same as `min_recursions`: all tokens
    take so many."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            given = (value,) if name == "stop" and isinstance(value, str) else value
            object.__setattr__(self, name, tuple(given) if isinstance(given, list) else given)
        check_fields(self, RequestError)
        for name in float_fields(SamplingParams):  # integers will do: 1 becomes 1.0
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}."
            )
        if self.prompt_logprobs_from > 1 and not self.prompt_logprobs:
            raise RequestError(
                f"prompt_logprobs_from={self.prompt_logprobs_from} must be 1 without "
                "prompt_logprobs."
            )
        minimum, maximum = self.min_recursions, self.max_recursions
        if minimum is not None and maximum is not None and maximum < minimum:
            raise RequestError(
                f"max_recursions={maximum} must be at least min_recursions={minimum}."
            )

    @property
    def reports_prompt_top(self) -> bool:
        """Whether the likeliest tokens in the place of each prompt token are reported."""
        return self.prompt_logprobs and self.logprobs is not None

    @property
    def has_penalties(self) -> bool:
        """Whether a token's logit depends on the tokens before it."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1, 0, 0)

    # -- the rules that all generators share ------------------------------------------------------

    def random_numbers(self, index: int) -> random.Random:
        """Source of the uniforms of completion `index`: one `.random()` for each sampled token."""
        return random.Random(None if self.seed is None else self.seed + index)

    def end_ids(self, *eos_token_ids: int | None) -> frozenset[int]:
        """Tokens that end this request at a model with these ends of text."""
        eos = () if self.ignore_eos else (i for i in eos_token_ids if i is not None)
        return frozenset((*self.stop_token_ids, *eos))

    def forbidden_ids(self, eos_token_id: int | None, num_tokens: int) -> Sequence[int]:
        """Tokens that must not come after `num_tokens` tokens of output."""
        return sorted(self.end_ids(eos_token_id)) if num_tokens < self.min_tokens else ()

    def recursion_range(self, num_recursions: int) -> tuple[int, int]:
        """(min, max) passes of each token in a model with R recursions; (0, R) is no limit."""
        return self.min_recursions or 0, self.max_recursions or num_recursions


@dataclass(kw_only=True)
class Completion:
    """One generated sequence."""

    prompt_token_ids: list[int]
    prompt_recursion_counts: list[int] = field(default_factory=list)
    """Passes of the block that each prompt token took."""
    num_cached_tokens: int = field(default=0, compare=False)
    """Tokens of the prompt that the generator did not have to compute again."""
    index: int = 0
    """Number among the n completions of its prompt."""
    text: str = ""
    """Text of the generated tokens, where the generator has a tokenizer."""
    token_ids: list[int] = field(default_factory=list)
    recursion_counts: list[int] = field(default_factory=list)
    """Passes that went into each generated token: those of the position that produced it."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each generated token under the model (before penalties, temperature and
    cuts)."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """For each generated token the likeliest ones and their log-probabilities, likeliest first;
    empty without `SamplingParams.logprobs`."""
    prompt_logprobs: list[float | None] = field(default_factory=list)
    """Log-probability of each prompt token, None for the first; empty if not asked for."""
    prompt_top_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    """The likeliest tokens in the place of each prompt token; None for the first."""
    finish_reason: FinishReason | None = None


def params_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """The params of every prompt: one for all, one for each, or None for the defaults.

    Raises:
        RequestError: there are more or fewer params than prompts.
    """
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(f"{len(params)} sampling params for {num_prompts} prompts: give one.")
    return list(params)


def check_request(
    config: MoRConfig, prompt: Sequence[int], params: SamplingParams, name: str = "the prompt"
) -> None:
    """Refuse what a model cannot serve.

    Raises:
        RequestError: the prompt, called `name`, is empty, holds an unknown id or does not fit the
            model; or the params ask for tokens or recursions that the model does not have.
    """
    if not prompt:
        raise RequestError(f"{name} is empty: it needs at least one token.")
    size = config.vocab_size
    bad = [t for t in prompt if not 0 <= t < size]
    if bad:
        raise RequestError(f"{name} holds token id {bad[0]}, outside 0..{size - 1}.")
    limit = config.max_position_embeddings
    if len(prompt) + params.max_tokens > limit:
        raise RequestError(
            f"{name} has {len(prompt)} tokens and max_tokens={params.max_tokens}; the "
            f"model takes {limit} in all: shorten the prompt or ask for fewer tokens."
        )
    bad = [t for t in params.stop_token_ids if t >= size]
    if bad:
        raise RequestError(f"{name}: stop_token_ids holds {bad[0]}, outside 0..{size - 1}.")
    if len(params.forbidden_ids(config.eos_token_id, 0)) == size:
        raise RequestError(
            f"{name}: min_tokens={params.min_tokens} forbids the tokens that end the request, "
            "which are all that there are: give fewer stop_token_ids."
        )
    _check_recursions(config, params, name)


def _check_recursions(config: MoRConfig, params: SamplingParams, name: str) -> None:
    for asked in ("min_recursions", "max_recursions"):
        value = getattr(params, asked)
        if value is None or value == config.num_recursions:
            continue
        if value > config.num_recursions:
            raise RequestError(
                f"{name}: {asked}={value} must lie in 1..{config.num_recursions}: the model has "
                f"num_recursions={config.num_recursions}."
            )
        if config.sharing == "sequence":
            raise RequestError(
                f"{name}: {asked}={value} needs sharing='cycle': with 'sequence' a token cannot "
                f"leave after a pass, so only num_recursions={config.num_recursions} works."
            )
