"""What the scheduler asks of the model runner in a step, and what comes back.

A step has three phases, in this order, each with a plan and an output:

    coda     CodaPlan     -> CodaOutput      tokens that have left the block: coda, head, sampling
    prelude  PreludePlan  -> PreludeOutput   tokens that enter: embedding, prelude, first router
    block    BlockPlan    -> BlockOutput     one pass of the shared block, tokens of all depths

Where decoding is all there is, several steps in a row have one plan and one output:

    DecodePlan -> DecodeOutput   multi-step decoding on the device (`mor.engine.multistep`)

The scheduler builds plans and takes outputs, the model runner takes plans and builds outputs. Both
are frozen; the chunks that they name are changed by the scheduler only. No tensors here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mor.engine.request import Chunk, SequenceState
from mor.model.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class SamplingInput:
    """What the sampler must know to choose one sequence's next token."""

    params: SamplingParams
    uniform: float
    """This token's random number in [0, 1); 0 for a greedy request, which does not look at it."""
    prompt: Sequence[int]
    """Token ids of the prompt, for the penalties; empty if the request has none."""
    output: Sequence[int]
    """Token ids generated so far, for the penalties; empty if the request has none."""
    forbidden: Sequence[int]
    """Token ids that must not come now: those that would end the text before `min_tokens`."""


@dataclass(frozen=True, kw_only=True)
class CodaPlan:
    """Chunks that go through coda and head."""

    chunks: tuple[Chunk, ...] = ()
    """Of each sequence in order of position."""
    sampled_chunks: tuple[int, ...] = ()
    """Indices into `chunks` of those that end with their sequence's last known token: a token is
    sampled after it. Rising."""
    sampling_inputs: tuple[SamplingInput, ...] = ()
    """One for each of `sampled_chunks`."""


@dataclass(frozen=True, kw_only=True)
class SamplerOutput:
    """Sampled tokens, one entry for each `SamplingInput`."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """Of the tokens, under the model: before penalties, temperature and truncation."""
    top_logprobs: tuple[dict[int, float], ...] = ()
    """The likeliest tokens and their log-probabilities, as many as the request asks for."""


@dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """Log-probabilities of consecutive tokens of one prompt."""

    chunk: int
    """Index into `CodaPlan.chunks` of the chunk whose tokens predict them."""
    logprobs: tuple[float, ...]
    """Of the token that follows each token of the chunk's `prompt_logprob_range`."""
    top_logprobs: tuple[dict[int, float], ...]
    """The likeliest tokens in their places, as many as the request asks for."""


@dataclass(frozen=True, kw_only=True)
class CodaOutput:
    """What came of a `CodaPlan`."""

    sampler_output: SamplerOutput = SamplerOutput()
    prompt_logprobs: tuple[PromptLogprobs, ...] = ()
    """For each chunk that has tokens in its `prompt_logprob_range`."""


@dataclass(frozen=True, kw_only=True)
class PreludePlan:
    """Chunks that enter the model, and pages to be copied before anything else happens."""

    chunks: tuple[Chunk, ...] = ()
    page_copies: tuple[tuple[int, int], ...] = ()
    """(from, to) pages: the begun last pages of prefixes that are reused. Copied in this order."""


@dataclass(frozen=True, kw_only=True)
class PreludeOutput:
    """What came of a `PreludePlan`."""

    goes_on: tuple[bool, ...] = ()
    """For each token of each chunk, in the plan's order: whether it takes its first pass."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """One pass of the block over runs of tokens: the active tokens of each chunk."""

    chunks: tuple[Chunk, ...] = ()
    """Those that write keys and values come first; within each kind rising by depth. So all rise
    by depth: where some chunks only read (shared KV), those that write are at depth 0."""
    first_kv_entries: tuple[int, ...] = ()
    """For each chunk the index of its first active token's entry in its page table; 0 for those
    that only read."""
    num_writing_chunks: int = 0
    """How many of the chunks write keys and values."""

    @property
    def num_tokens(self) -> int:
        """Tokens that take this pass."""
        return sum(len(chunk.active) for chunk in self.chunks)


@dataclass(frozen=True, kw_only=True)
class BlockOutput:
    """What came of a `BlockPlan`."""

    goes_on: tuple[bool, ...] = ()
    """For each active token of each chunk, in the plan's order: whether its router sends it on."""


@dataclass(frozen=True, kw_only=True)
class DecodePlan:
    """Several decode steps in a row."""

    chunks: tuple[Chunk, ...]
    """The token in flight of each running sequence, a chunk of one; its tables have pages for all
    entries that these steps can add."""
    num_steps: int


class DecodedToken(NamedTuple):
    """A token that a step of multi-step decoding sampled."""

    token_id: int
    logprob: float
    """Of the token, under the model: before temperature and truncation."""
    num_passes: int
    """Passes of the block of the position that produced it."""


@dataclass(frozen=True, kw_only=True)
class DecodeOutput:
    """What came of a `DecodePlan`."""

    steps: tuple[tuple[DecodedToken | None, ...], ...]
    """For each step and each chunk of the plan: what was sampled for its sequence; None where the
    token in flight was still in the block, or the sequence had its last token already."""
    active: tuple[bool, ...]
    """For each sequence whether its token in flight, at the end, takes another pass."""
    depths: tuple[int, ...]
    """For each sequence the passes that its token in flight, at the end, has behind it."""


def make_sampling_input(sequence: SequenceState) -> SamplingInput:
    """What the sampler must know about a sequence's next token."""
    params = sequence.params
    is_early = sequence.num_output_tokens < params.min_tokens
    return SamplingInput(
        params=params,
        uniform=sequence.uniform(),
        prompt=sequence.prompt_token_ids if params.has_penalties else (),
        output=sequence.output_token_ids if params.has_penalties else (),
        forbidden=sorted(sequence.stop_token_ids) if is_early else (),
    )
