"""What the scheduler asks of the model runner in a step, and what comes back.

A step has three phases, in this order, each with a plan and an output:

    coda     CodaPlan     -> CodaOutput      tokens that have left the block: coda, head, sampling
    prelude  PreludePlan  -> PreludeOutput   tokens that enter: embedding, prelude, first router
    block    BlockPlan    -> BlockOutput     one pass of the shared block, tokens of all depths

The model runner knows plans only, the scheduler outputs only. Plain data: no tensors here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
