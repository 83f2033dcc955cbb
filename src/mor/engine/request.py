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

    sequence: "Sequence"
    start: int
    """Position of its first token."""
    rows: list[int]
    """Where the runner keeps each token's hidden state."""
    counts: list[int] = field(default_factory=list)
    """Passes that each token has taken."""
    present: list[int] = field(default_factory=list)
    """Tokens that take the coming pass, by their place in the chunk, rising."""
    depth: int = 0
    """Of the coming pass."""
    left_at: int = 0
    """Tick in which the last token left the block."""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def scored(self) -> range:
        """Tokens, by their place in it, after which a prompt token's probability is asked for."""
        sequence = self.sequence
        if not sequence.params.prompt_logprobs:
            return range(0)
        first = max(0, sequence.params.prompt_logprobs_from - 1 - self.start)
        return range(first, max(first, min(len(self), sequence.num_prompt - 1 - self.start)))


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One completion in the making: `index` of the `n` that a request asked for."""

    request_id: str
    index: int
    order: int
    """Rank of arrival: who came first is served first and preempted last."""
    params: SamplingParams
    tokens: list[int]
    """Prompt and output."""
    num_prompt: int
    least: int
    """Recursions that every token takes at least, .."""
    most: int
    """.. and at most."""
    stop_ids: frozenset[int]
    """Tokens that end it."""
    random: Random
    outer: PageTable | None
    """Entries of prelude and coda, every token's; None if there are no such layers."""
    depths: list[PageTable]
    """Entries of the block at each depth; a single table if all depths share theirs."""

    counts: list[int] = field(default_factory=list)
    """Recursion count of every token that has left the block."""
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    """In flight, in order of position."""
    is_running: bool = False
    """Whether it was admitted and not preempted since."""
    num_entered: int = 0
    """Tokens whose way through the model has begun, .."""
    num_finished: int = 0
    """.. and is over."""
    finish_reason: FinishReason | None = None
    uniforms: list[float] = field(default_factory=list)
    """Random numbers of its next tokens, as far as they are drawn."""
    prefix_node: PrefixNode | None = None
    """The last of its own prefixes that the prefix cache knows."""
    prefix_open: bool = True
    """Whether its further tokens may still join the prefix cache."""
    num_cached: int = 0
    """Prompt tokens that the prefix cache spared."""

    def __post_init__(self) -> None:
        unscored = range(min(self.params.prompt_logprobs_from, self.num_prompt))
        if self.params.prompt_logprobs:
            self.prompt_logprobs = [None for _ in unscored]
        if self.params.reports_prompt_top:
            self.prompt_top_logprobs = [None for _ in unscored]

    @property
    def tables(self) -> list[PageTable]:
        """All its page tables."""
        return self.depths if self.outer is None else [self.outer, *self.depths]

    @property
    def output(self) -> list[int]:
        """Generated tokens."""
        return self.tokens[self.num_prompt :]

    @property
    def num_remaining(self) -> int:
        """Tokens that it may still generate."""
        return self.params.max_tokens - (len(self.tokens) - self.num_prompt)

    @property
    def num_waiting(self) -> int:
        """Tokens that have not entered yet."""
        return len(self.tokens) - self.num_entered

    @property
    def prefix_root(self) -> tuple[int, int]:
        """Only sequences with the same recursion limits can share what was computed."""
        return self.least, self.most

    def uniform(self, ahead: int = 0) -> float:
        """Random number in [0, 1) for the next token, or one further ahead; greedy has none."""
        if self.params.temperature == 0:
            return 0.0
        while len(self.uniforms) <= ahead:
            self.uniforms.append(self.random.random())
        return self.uniforms[ahead]

    def append(self, token: int, logprob: float, top_logprobs: dict[int, float]) -> None:
        """A token that was sampled for it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.params.logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        del self.uniforms[:1]

    def note_prompt(
        self, first: int, scores: list[float], likeliest: list[dict[int, float]]
    ) -> None:
        """Log-probabilities of the prompt's tokens from `first` on, and of the likeliest there."""
        self.prompt_logprobs[first : first + len(scores)] = scores
        if self.params.reports_prompt_top:
            self.prompt_top_logprobs[first : first + len(scores)] = likeliest

    def completion(self, text: str) -> Completion:
        """What the caller gets, now or in the end."""
        output = self.output
        return Completion(
            prompt_token_ids=self.tokens[: self.num_prompt],
            prompt_recursion_counts=self.counts[: self.num_prompt],
            num_cached_tokens=self.num_cached,
            index=self.index,
            text=text,
            token_ids=output,
            recursion_counts=self.counts[self.num_prompt - 1 :][: len(output)],
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            prompt_top_logprobs=self.prompt_top_logprobs,
            finish_reason=self.finish_reason,
        )

    def reset(self) -> None:
        """Give back what it holds, to be computed again; what the caller may hear of it stays."""
        for table in self.tables:
            table.clear()
        self.chunks.clear()
        self.num_entered = self.num_finished = self.num_cached = 0
        self.prefix_node, self.prefix_open = None, True


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
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
