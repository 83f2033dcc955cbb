"""What is being generated: sequences, their tokens in flight, and what the caller hears of them."""

from dataclasses import dataclass, field
from random import Random

from mor.engine.pages import PageTable
from mor.engine.prefix import PrefixNode
from mor.model.sampling import Completion, FinishReason, SamplingParams


@dataclass(eq=False, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence that entered together and leave together.

    A prompt enters in chunks, a generated token is a chunk of one. At each depth the tokens that go
    on are a shorter run; when none is left, the chunk waits for the coda.
    """

    sequence: "SequenceState"
    start: int
    """Position of its first token."""
    state_slots: list[int]
    """Where the runner keeps each token's hidden state."""
    recursion_counts: list[int] = field(default_factory=list)
    """Passes that each token has taken."""
    active: list[int] = field(default_factory=list)
    """Tokens that take the coming pass, by their place in the chunk, rising."""
    depth: int = 0
    """Of the coming pass."""
    exited_at_step: int = 0
    """Tick in which the last token left the block."""

    def __len__(self) -> int:
        return len(self.state_slots)

    @property
    def prompt_logprob_range(self) -> range:
        """Tokens, by their place in it, after which a prompt token's probability is asked for."""
        sequence = self.sequence
        if not sequence.params.prompt_logprobs:
            return range(0)
        first = max(0, sequence.params.prompt_logprobs_from - 1 - self.start)
        return range(first, max(first, min(len(self), sequence.num_prompt_tokens - 1 - self.start)))


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One completion in the making: `index` of the `n` that a request asked for."""

    request_id: str
    index: int
    arrival_index: int
    """Rank of arrival: who came first is served first and preempted last."""
    params: SamplingParams
    token_ids: list[int]
    """Prompt and output."""
    num_prompt_tokens: int
    min_recursions: int
    """Recursions that every token takes at least, .."""
    max_recursions: int
    """.. and at most."""
    stop_token_ids: frozenset[int]
    """Tokens that end it."""
    rng: Random
    unshared_table: PageTable | None
    """Entries of prelude and coda, every token's; None if there are no such layers."""
    depth_tables: list[PageTable]
    """Entries of the block at each depth; a single table if all depths share theirs."""

    recursion_counts: list[int] = field(default_factory=list)
    """Recursion count of every token that has left the block."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    """In flight, in order of position."""
    is_running: bool = False
    """Whether it was admitted and not preempted since."""
    num_scheduled_tokens: int = 0
    """Tokens whose way through the model has begun, .."""
    num_computed_tokens: int = 0
    """.. and is over."""
    finish_reason: FinishReason | None = None
    uniforms: list[float] = field(default_factory=list)
    """Random numbers of its next tokens, as far as they are drawn."""
    prefix_node: PrefixNode | None = None
    """The last of its own prefixes that the prefix cache knows."""
    can_extend_prefix: bool = True
    """Whether its further tokens may still join the prefix cache."""
    num_cached_tokens: int = 0
    """Prompt tokens that the prefix cache spared."""

    def __post_init__(self) -> None:
        unscored = range(min(self.params.prompt_logprobs_from, self.num_prompt_tokens))
        if self.params.prompt_logprobs:
            self.prompt_logprobs = [None for _ in unscored]
        if self.params.reports_prompt_top:
            self.prompt_top_logprobs = [None for _ in unscored]

    @property
    def page_tables(self) -> list[PageTable]:
        """All its page tables."""
        return (
            self.depth_tables
            if self.unshared_table is None
            else [self.unshared_table, *self.depth_tables]
        )

    @property
    def output_token_ids(self) -> list[int]:
        """Generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_remaining(self) -> int:
        """Tokens that it may still generate."""
        return self.params.max_tokens - (len(self.token_ids) - self.num_prompt_tokens)

    @property
    def num_unscheduled_tokens(self) -> int:
        """Tokens that have not entered yet."""
        return len(self.token_ids) - self.num_scheduled_tokens

    @property
    def prefix_namespace(self) -> tuple[int, int]:
        """Only sequences with the same recursion limits can share what was computed."""
        return self.min_recursions, self.max_recursions

    def uniform(self, ahead: int = 0) -> float:
        """Random number in [0, 1) for the next token, or one further ahead; greedy has none."""
        if self.params.temperature == 0:
            return 0.0
        while len(self.uniforms) <= ahead:
            self.uniforms.append(self.rng.random())
        return self.uniforms[ahead]

    def append(self, token: int, logprob: float, top_logprobs: dict[int, float]) -> None:
        """A token that was sampled for it."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self.params.logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        del self.uniforms[:1]

    def record_prompt_logprobs(
        self, first: int, scores: list[float], likeliest: list[dict[int, float]]
    ) -> None:
        """Log-probabilities of the prompt's tokens from `first` on, and of the likeliest there."""
        self.prompt_logprobs[first : first + len(scores)] = scores
        if self.params.reports_prompt_top:
            self.prompt_top_logprobs[first : first + len(scores)] = likeliest

    def to_completion(self, text: str) -> Completion:
        """What the caller gets, now or in the end."""
        output = self.output_token_ids
        return Completion(
            prompt_token_ids=self.token_ids[: self.num_prompt_tokens],
            prompt_recursion_counts=self.recursion_counts[: self.num_prompt_tokens],
            num_cached_tokens=self.num_cached_tokens,
            index=self.index,
            text=text,
            token_ids=output,
            recursion_counts=self.recursion_counts[self.num_prompt_tokens - 1 :][: len(output)],
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            prompt_top_logprobs=self.prompt_top_logprobs,
            finish_reason=self.finish_reason,
        )

    def reset(self) -> None:
        """Give back what it holds, to be computed again; what the caller may hear of it stays."""
        for table in self.page_tables:
            table.clear()
        self.chunks.clear()
        self.num_scheduled_tokens = self.num_computed_tokens = self.num_cached_tokens = 0
        self.prefix_node, self.can_extend_prefix = None, True


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """A generated token, as the caller of `step` hears of it."""

    request_id: str
    index: int
    """Which of the request's n completions."""
    token_id: int
    text: str
    """What the token adds to the text; a token may add nothing yet, e.g. half of a character."""
    logprob: float
    recursion_count: int
    """Passes of the position that produced the token."""
    top_logprobs: dict[int, float] = field(default_factory=dict)
    """The likeliest tokens in its place, as many as were asked for."""
    prompt: Completion | None = None
    """With the first token of a completion: what came of its prompt (counts, log-probabilities)."""
    finish_reason: FinishReason | None = None
    completions: list[Completion] | None = None
    """All of the request's completions, with the last token of the last one."""
