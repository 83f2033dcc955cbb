"""The reference generator: one token at a time, with a ragged key-value cache per depth.

It is the oracle that faster engines are held to: clear first, fast second. Routing is the causal
`threshold` rule (token choice is causal by itself), so generating with the cache gives what
recomputing the whole sequence at every step would give.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mor.errors import RequestError
from mor.model.config import MoRConfig
from mor.model.mor import MoRModel
from mor.model.packing import Packing
from mor.model.sharing import UNSHARED, Slot

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when a request ends.

    Raises:
        RequestError: a value is out of its range.
    """

    max_tokens: int = 64
    """Tokens to generate at most."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together hold this probability."""
    seed: int | None = None
    """Of this request's own random numbers; None draws one."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the request; they are part of the output."""

    def __post_init__(self) -> None:
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
        }
        for name, (good, range_) in checks.items():
            if not good:
                raise RequestError(f"{name}={getattr(self, name)!r} must be {range_}.")


@dataclass(kw_only=True)
class Completion:
    """One generated sequence."""

    prompt_token_ids: list[int]
    prompt_recursion_counts: list[int] = field(default_factory=list)
    """Passes of the block that each prompt token took."""
    token_ids: list[int] = field(default_factory=list)
    recursion_counts: list[int] = field(default_factory=list)
    """Passes that went into each generated token: those of the position that produced it."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probability of each generated token under the model (before temperature and cuts)."""
    finish_reason: FinishReason | None = None


class RaggedKVCache:
    """Keys and values by (depth, layer) and sequence; each depth holds only its own tokens.

    Implements `KVAccess`. With `kv_strategy='shared'` only depth 0 stores, and serves all depths.
    """

    def __init__(self, config: MoRConfig, num_sequences: int) -> None:
        self._shared = config.kv_strategy == "shared"
        self._sequences = list(range(num_sequences))
        self._kept: dict[tuple[Slot, int], tuple[Tensor, Tensor, Tensor]] = {}

    def begin(self, sequences: Sequence[int]) -> None:
        """Say which sequence each row of the coming packing is."""
        self._sequences = list(sequences)

    def num_entries(self, depth: int, sequence: int) -> int:
        """Tokens of a sequence that are held at a depth (UNSHARED: in prelude and coda)."""
        sizes = [
            len(kept[2])
            for (slot, seq), kept in self._kept.items()
            if slot.depth == depth and seq == sequence
        ]
        return max(sizes, default=0)

    def has_kv(self, slot: Slot) -> bool:
        """True below depth 0 when depths share their keys and values."""
        return self._shared and slot.depth > 0

    def attend(
        self, slot: Slot, q: Tensor, k: Tensor | None, v: Tensor | None, packing: Packing
    ) -> Tensor:
        """Append k and v, then let each query see the entries up to its own position."""
        out = torch.empty_like(q)
        rows = packing.rows
        for row, sequence in enumerate(self._sequences):
            mine = (rows == row).nonzero().squeeze(1)
            if len(mine) == 0:
                continue
            where = packing.positions[mine]
            if k is not None and v is not None:
                self._append(slot, sequence, k[mine], v[mine], where)
            home = Slot(0, slot.layer) if self.has_kv(slot) else slot
            keys, values, times = self._kept[home, sequence]
            seen = times[None, :] <= where[:, None]  # (new, entries)
            out[mine] = F.scaled_dot_product_attention(
                q[mine].transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=seen,
                enable_gqa=q.shape[1] != keys.shape[1],
            )[0].transpose(0, 1)
        return out

    def _append(self, slot: Slot, sequence: int, k: Tensor, v: Tensor, where: Tensor) -> None:
        if (slot, sequence) in self._kept:
            old = self._kept[slot, sequence]
            k, v, where = (torch.cat(pair) for pair in zip(old, (k, v, where), strict=True))
        self._kept[slot, sequence] = k, v, where


def ragged_packing(starts: Sequence[int], lengths: Sequence[int], device: torch.device) -> Packing:
    """The packing of new tokens: row i holds `lengths[i]` tokens from position `starts[i]` on."""
    width = max(lengths)
    within = torch.cat([torch.arange(n, device=device) for n in lengths])
    rows = torch.repeat_interleave(
        torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device)
    )
    ragged = any(n != width for n in lengths)
    return Packing(
        flat=torch.arange(len(within), device=device),
        positions=within + torch.tensor(starts, device=device)[rows],
        batch=len(lengths),
        width=width,
        pad=rows * width + within if ragged else None,
    )


def pick(
    logits: Float[Tensor, " v"], params: SamplingParams, generator: torch.Generator
) -> tuple[int, float]:
    """Choose a token from one position's logits; also its log-probability under the model."""
    logprobs = torch.log_softmax(logits.double(), dim=-1)
    if params.temperature == 0:
        token = int(logits.argmax())
        return token, float(logprobs[token])
    scaled = logits.double() / params.temperature
    if params.top_k and params.top_k < len(scaled):
        least = scaled.topk(params.top_k).values[-1]
        scaled = scaled.masked_fill(scaled < least, -torch.inf)
    if params.top_p < 1:
        ordered, order = scaled.softmax(-1).sort(descending=True)
        before = ordered.cumsum(-1) - ordered
        scaled = scaled.index_fill(0, order[before >= params.top_p], -torch.inf)
    token = int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
    return token, float(logprobs[token])


@torch.no_grad()
def generate(
    model: MoRModel,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    on_token: Callable[[int, int, int], None] | None = None,
) -> list[Completion]:
    """Continue each prompt (token ids; lengths may differ).

    Args:
        params: for all prompts, or one for each; None is greedy.
        on_token: called as (prompt's number, token id, recursion count) when a token is there.

    Raises:
        RequestError: a prompt is empty, holds an unknown id, or does not fit the model.
    """
    each = _per_prompt(params, len(prompts))
    completions = [Completion(prompt_token_ids=list(p)) for p in prompts]
    for number, (prompt, p) in enumerate(zip(prompts, each, strict=True)):
        _check_prompt(model.config, number, prompt, p)
    generators = [_generator(p.seed) for p in each]
    was_training = model.training
    model.eval()
    cache = RaggedKVCache(model.config, len(prompts))
    active = list(range(len(prompts)))
    feed, starts = [list(p) for p in prompts], [0] * len(prompts)
    while active:
        logits, counts = _step(model, cache, active, [feed[i] for i in active], starts)
        for i, row_logits, row_counts in zip(active, logits, counts, strict=True):
            done = completions[i]
            if not done.token_ids:
                done.prompt_recursion_counts = row_counts
            token, logprob = pick(row_logits, each[i], generators[i])
            done.token_ids.append(token)
            done.logprobs.append(logprob)
            done.recursion_counts.append(row_counts[-1])
            starts[i] += len(feed[i])
            feed[i] = [token]
            if on_token is not None:
                on_token(i, token, row_counts[-1])
            done.finish_reason = _finished(done, each[i])
        active = [i for i in active if completions[i].finish_reason is None]
    model.train(was_training)
    return completions


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(f"{len(params)} sampling params for {num_prompts} prompts: give one.")
    return list(params)


def _check_prompt(
    config: MoRConfig, number: int, prompt: Sequence[int], params: SamplingParams
) -> None:
    limit = config.max_position_embeddings
    if not prompt:
        raise RequestError(f"prompt {number} is empty: it needs at least one token.")
    bad = [t for t in prompt if not 0 <= t < config.vocab_size]
    if bad:
        raise RequestError(
            f"prompt {number} holds token id {bad[0]}, outside 0..{config.vocab_size - 1}."
        )
    if len(prompt) + params.max_tokens > limit:
        raise RequestError(
            f"prompt {number} has {len(prompt)} tokens and max_tokens={params.max_tokens}; the "
            f"model takes {limit} in all: shorten the prompt or ask for fewer tokens."
        )


def _generator(seed: int | None) -> torch.Generator:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def _step(
    model: MoRModel,
    cache: RaggedKVCache,
    active: Sequence[int],
    feed: Sequence[Sequence[int]],
    starts: Sequence[int],
) -> tuple[Tensor, list[list[int]]]:
    """Feed each active sequence its new tokens: (rows, V) last logits, counts of all new tokens."""
    device = model.embed_tokens.weight.device
    lengths = [len(f) for f in feed]
    packing = ragged_packing([starts[i] for i in active], lengths, device)
    cache.begin(active)
    context = model.context(packing, cache)
    ids = torch.tensor([t for f in feed for t in f], device=device)
    x = model.run_prelude(model.embed_tokens(ids), context)
    x, counts, _ = model.recurse(x, context, "threshold")
    x = model.run_coda(x, context)
    last = torch.tensor(lengths, device=device).cumsum(0) - 1
    split = [c.tolist() for c in counts.split(lengths)]
    return model.readout(x[last]).cpu(), split


def _finished(done: Completion, params: SamplingParams) -> FinishReason | None:
    if done.token_ids[-1] in params.stop_token_ids:
        return "stop"
    return "length" if len(done.token_ids) >= params.max_tokens else None


__all__ = [
    "UNSHARED",
    "Completion",
    "RaggedKVCache",
    "SamplingParams",
    "generate",
    "pick",
    "ragged_packing",
]
