"""The reference generator: one token at a time, with a ragged key-value cache per depth.

Tests compare every faster engine with it; it is written to be clear, not fast. Routing is the
causal `threshold` rule (token choice is causal by itself), so generating with the cache gives what
recomputing the whole sequence at every step would give.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mor.errors import RequestError
from mor.model.attention import AttentionBackend
from mor.model.config import MoRConfig
from mor.model.ragged_batch import RaggedBatch
from mor.model.router import RecursionLimits
from mor.model.sampling import Completion, SamplingParams, check_request, params_for_each
from mor.model.sharing import LayerKey
from mor.model.transformer import MoRModel


class RaggedKVCache(AttentionBackend):
    """Keys and values by (depth, layer) and sequence; each depth holds only its own tokens.

    The config's `KVPolicy` says which depths write and which of them are read.
    """

    def __init__(self, config: MoRConfig, num_sequences: int) -> None:
        self._kv_policy = config.kv_policy
        self._sequences = list(range(num_sequences))
        # (entries, G, D) keys and values and (entries,) positions
        self._kept: dict[tuple[LayerKey, int], tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, sequences: Sequence[int]) -> None:
        """Say which sequence of the cache each sequence of the coming batch is."""
        self._sequences = list(sequences)

    def has_kv(self, layer_key: LayerKey) -> bool:
        return not self._kv_policy.writes(layer_key.depth)

    def attend(
        self,
        layer_key: LayerKey,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        ragged: RaggedBatch,
    ) -> Tensor:
        out = torch.empty_like(q)
        sequence_ids = ragged.sequence_ids
        for index, sequence in enumerate(self._sequences):
            mine = (sequence_ids == index).nonzero().squeeze(1)  # rows of its tokens
            if len(mine) == 0:  # none of them is at this depth
                continue
            where = ragged.positions[mine]
            # First append, then look: a token sees itself.
            if k is not None and v is not None:
                self._append(layer_key, sequence, k[mine], v[mine], where)
            read = layer_key._replace(depth=self._kv_policy.kv_depth(layer_key.depth))
            keys, values, times = self._kept[read, sequence]
            seen = times[None, :] <= where[:, None]  # (new, entries)
            out[mine] = F.scaled_dot_product_attention(
                q[mine].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=seen,
                enable_gqa=q.shape[1] != keys.shape[1],
            )[0].transpose(0, 1)
        return out

    def _append(
        self, layer_key: LayerKey, sequence: int, k: Tensor, v: Tensor, where: Tensor
    ) -> None:
        if (layer_key, sequence) in self._kept:
            old = self._kept[layer_key, sequence]
            k, v, where = (torch.cat(pair) for pair in zip(old, (k, v, where), strict=True))
        self._kept[layer_key, sequence] = k, v, where


def batch_new_tokens(
    starts: Sequence[int], lengths: Sequence[int], device: torch.device
) -> RaggedBatch:
    """The batch in which sequence i has `lengths[i]` new tokens, from position `starts[i]` on."""
    width = max(lengths)
    within = torch.cat([torch.arange(n, device=device) for n in lengths])
    rows = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )
    ragged = any(n != width for n in lengths)
    return RaggedBatch(
        token_indices=torch.arange(len(within), device=device),
        positions=within + torch.tensor(starts, device=device)[rows],
        batch=len(lengths),
        width=width,
        padded_indices=rows * width + within if ragged else None,
    )


def penalize(
    logits: Float[Tensor, " v"],
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
) -> Float[Tensor, " v"]:
    """(V,) logits after the repetition, presence and frequency penalties."""
    logits = logits.clone()
    counts = Counter(output)
    # Repetition counts prompt and output (CTRL, arXiv 1909.05858), the other two the output only.
    for token in {*prompt, *output}:
        logit, penalty = float(logits[token]), params.repetition_penalty
        logit = logit / penalty if logit > 0 else logit * penalty  # lower, whatever its sign
        if token in counts:
            logit -= params.presence_penalty + params.frequency_penalty * counts[token]
        logits[token] = logit
    return logits


def pick(
    logits: Float[Tensor, " v"],
    params: SamplingParams,
    uniform: float,
    *,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    forbidden: Sequence[int] = (),
) -> int:
    """The token that one position's (V,) logits and a random number give.

    In the order of `mor.model.sampling`: penalties, temperature, top_k, top_p, min_p; then the
    first token at which the cumulative weight exceeds `uniform` times the whole.

    Args:
        uniform: this token's random number in [0, 1); greedy choice does not look at it.
        prompt: token ids that the repetition penalty counts.
        output: token ids that all three penalties count.
        forbidden: ids that are never chosen.
    """
    scores = penalize(logits.double(), params, prompt, output)
    scores[list(forbidden)] = -torch.inf
    if params.temperature == 0:
        return int(scores.argmax())
    weights = ((scores - scores.max()) / params.temperature).exp()  # the likeliest has weight 1
    if 0 < params.top_k < len(weights):
        weights[weights < weights.topk(params.top_k).values[-1]] = 0
    if params.top_p < 1:
        ordered = weights.sort(descending=True).values
        enough = params.top_p * weights.cumsum(0)[-1]
        # These many reach less than the share top_p; the one after them reaches it and stays.
        num_less = int((ordered.cumsum(0) < enough).sum())
        weights[weights < ordered[min(num_less, len(ordered) - 1)]] = 0
    weights[weights < params.min_p] = 0  # a share of the likeliest's weight, which is 1
    sums = weights.cumsum(0)
    return int((sums > uniform * sums[-1]).nonzero()[0])


def likeliest(logprobs: Float[Tensor, " v"], num: int) -> dict[int, float]:
    """The `num` likeliest tokens and their log-probabilities in nats, likeliest first."""
    order = logprobs.sort(descending=True, stable=True).indices[:num].tolist()
    return {token: float(logprobs[token]) for token in order}


@dataclass(kw_only=True)
class _Sequence:
    """A completion that is being generated."""

    params: SamplingParams
    random: random.Random
    done: Completion
    feed: list[int]
    """Tokens that the model has not seen yet: the prompt, then the token sampled last."""
    start: int = 0
    """Position of the first token in `feed`."""


@torch.no_grad()
def generate(
    model: MoRModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    on_token: Callable[[int, int, int], None] | None = None,
) -> list[Completion]:
    """Completions of each prompt (token ids; lengths may differ), all prompts in one batch.

    Args:
        params: for all prompts, or one for each; None is greedy.
        on_token: called with (completion's number, token id, recursion count) for each token.

    Returns:
        `params.n` completions of the first prompt, then those of the second, and so on.

    Raises:
        RequestError: a prompt is empty, holds an unknown id, or does not fit the model; the model
            cannot do what the params ask for; or they hold stop strings, which need a tokenizer.
    """
    sequences = []
    # Everything is checked before anything is computed.
    each = params_for_each(params, len(prompts))
    for number, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
        check_request(model.config, prompt, p, f"prompt {number}")
        if p.stop:
            raise RequestError(
                f"prompt {number}: stop={p.stop!r} needs a tokenizer, and this generator has "
                "none: give stop_token_ids."
            )
        for index in range(p.n):
            done = Completion(prompt_token_ids=list(prompt), index=index)
            source = p.random_numbers(index)
            sequences.append(_Sequence(params=p, random=source, done=done, feed=list(prompt)))
    was_training = model.training
    model.eval()
    cache = RaggedKVCache(model.config, len(sequences))
    # All sequences step together; those that have finished leave the batch.
    active = list(range(len(sequences)))
    while active:
        rows = _step(model, cache, active, [sequences[i] for i in active])
        for i, (states, logits, counts) in zip(active, rows, strict=True):
            _advance(model, sequences[i], states, logits, counts)
            if on_token is not None:
                on_token(i, sequences[i].done.token_ids[-1], counts[-1])
        active = [i for i in active if sequences[i].done.finish_reason is None]
    model.train(was_training)
    return [sequence.done for sequence in sequences]


def _step(
    model: MoRModel, cache: RaggedKVCache, numbers: Sequence[int], rows: Sequence[_Sequence]
) -> list[tuple[Tensor, Tensor, list[int]]]:
    """Run the model over each sequence's new tokens.

    Args:
        numbers: of the sequences in the cache.

    Returns:
        For each sequence the (new, E) states after the coda, the last one's (V,) logits, and the
        new tokens' recursion counts.
    """
    device = model.embed_tokens.weight.device
    lengths = [len(row.feed) for row in rows]
    ragged = batch_new_tokens([row.start for row in rows], lengths, device)
    cache.begin(numbers)
    context = model.context(ragged, cache)
    ids = torch.tensor([t for row in rows for t in row.feed], device=device)
    x = model.run_prelude(model.embed_tokens(ids), context)
    limits = _limits(model.config, rows, device)
    x, counts, _ = model.run_recursions(x, context, "threshold", limits=limits)
    x = model.run_coda(x, context)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1  # row of each sequence's last token
    logits = model.compute_logits(x[last]).cpu()
    split = [c.tolist() for c in counts.split(lengths)]
    return list(zip(x.split(lengths), logits, split, strict=True))


def _limits(
    config: MoRConfig, rows: Sequence[_Sequence], device: torch.device
) -> RecursionLimits | None:
    """Bounds on each new token's recursions from the requests' params; None if there are none."""
    num = config.num_recursions
    ranges = [row.params.recursion_range(num) for row in rows for _ in row.feed]
    if config.sharing == "sequence" or all(limit == (0, num) for limit in ranges):
        return None
    minimum, maximum = torch.tensor(ranges, device=device).unbind(1)
    return RecursionLimits(min_recursions=minimum, max_recursions=maximum)


def _advance(
    model: MoRModel, sequence: _Sequence, states: Tensor, logits: Tensor, counts: list[int]
) -> None:
    """Choose a sequence's next token and add it to its completion.

    Args:
        states: (new, E) of the tokens just fed; logits and counts as `_step` returns them.
    """
    done, params, eos = sequence.done, sequence.params, model.config.eos_token_id
    if not done.token_ids:  # these states are the prompt's
        done.prompt_recursion_counts = counts
        if params.prompt_logprobs:
            # Position i - 1 predicts token i; nothing predicts token 0.
            every = model.compute_logits(states).double().log_softmax(-1)  # (prompt, V)
            first, tokens = params.prompt_logprobs_from, done.prompt_token_ids
            unknown: list[None] = [None] * min(first, len(tokens))
            scored = range(first, len(tokens))
            done.prompt_logprobs = [*unknown, *(float(every[i - 1, tokens[i]]) for i in scored)]
            if params.logprobs is not None:
                top = [likeliest(every[i - 1], params.logprobs) for i in scored]
                done.prompt_top_logprobs = [*unknown, *top]
    token = pick(
        logits,
        params,
        sequence.random.random() if params.temperature else 0.0,
        prompt=done.prompt_token_ids,
        output=done.token_ids,
        forbidden=params.forbidden_ids(eos, len(done.token_ids)),
    )
    logprobs = logits.double().log_softmax(-1)  # before penalties and temperature
    done.token_ids.append(token)
    done.recursion_counts.append(counts[-1])
    done.logprobs.append(float(logprobs[token]))
    if params.logprobs is not None:
        done.top_logprobs.append(likeliest(logprobs, params.logprobs))
    if token in params.end_ids(eos):
        done.finish_reason = "stop"
    elif len(done.token_ids) == params.max_tokens:
        done.finish_reason = "length"
    sequence.start += len(sequence.feed)
    sequence.feed = [token]


__all__ = [
    "RaggedKVCache",
    "batch_new_tokens",
    "generate",
    "likeliest",
    "penalize",
    "pick",
]
