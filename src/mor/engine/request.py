"""Sequences being generated, their chunks of tokens in flight, and the outputs that callers get."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from mor.engine.pages import PageTable
from mor.engine.prefix import PrefixNode
from mor.model.sampling import Completion, FinishReason, SamplingParams


@dataclass(eq=False, kw_only=True)
class Chunk:
    """Consecutive tokens of one sequence that entered together and leave together.

    A prompt enters in chunks, a generated token is a chunk of one. From pass to pass fewer of its
    tokens are active; when none is left, the chunk waits for the coda.
    """

    sequence: "SequenceState"
    start: int
    """Position of its first token in the sequence."""
    state_slots: list[int]
    """For each token, its row in the buffers of `HiddenStates`."""
    recursion_counts: list[int] = field(default_factory=list)
    """For each token, the recursions that it has taken so far."""
    active: list[int] = field(default_factory=list)
    """Places in the chunk of the tokens that take the coming pass, rising."""
    depth: int = 0
    """Depth of the coming pass, from 0: the passes that its active tokens have behind them."""
    exited_at_step: int = 0
    """`Scheduler.step_index` of the step in which its last token left the block."""

    def __len__(self) -> int:
        return len(self.state_slots)

    @property
    def is_last(self) -> bool:
        """Whether it ends with its sequence's last known token, after which one is sampled."""
        return self.start + len(self) == len(self.sequence.token_ids)

    @property
    def prompt_logprob_range(self) -> range:
        """Places in the chunk of tokens whose successor's log-probability is asked for.

        Only successors inside the prompt count, from `prompt_logprobs_from` on.
        """
        sequence = self.sequence
        if not sequence.params.prompt_logprobs:
            return range(0)
        # A token predicts its successor, so each bound lies one place before that of the scores.
        first = max(0, sequence.params.prompt_logprobs_from - 1 - self.start)
        return range(first, max(first, min(len(self), sequence.num_prompt_tokens - 1 - self.start)))


@dataclass(eq=False, kw_only=True)
class SequenceState:
    """One completion in the making: `index` of the `n` that a request asked for."""

    request_id: str
    index: int
    """Which of the request's `n` completions it becomes, counted from 0."""
    arrival_index: int
    """Rank of its request's arrival: who came first is served first and preempted last."""
    params: SamplingParams
    token_ids: list[int]
    """Prompt and output, one after the other."""
    num_prompt_tokens: int
    """Tokens of the prompt, the first ones of `token_ids`."""
    min_recursions: int
    """Recursions that each token takes even where its router would let it exit; 0 is no limit."""
    max_recursions: int
    """Recursions after which each token exits even where its router would send it on."""
    stop_token_ids: frozenset[int]
    """Token ids that end it: those of its request, and the model's ends of text."""
    rng: Random
    """Draws a random number for each generated token."""
    unshared_table: PageTable | None
    """KV entries of prelude and coda, one for every token; None if there are no such layers."""
    depth_tables: list[PageTable]
    """KV entries of the block, a table for each depth; only one if all depths share their KV."""

    recursion_counts: list[int] = field(default_factory=list)
    """For each computed token, from the first on, the recursions that it took."""
    logprobs: list[float] = field(default_factory=list)
    """For each generated token, its log-probability under the model."""
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    """For each generated token, the likeliest tokens in its place and their log-probabilities.
    Empty if the request does not ask for them."""
    prompt_logprobs: list[float | None] = field(default_factory=list)
    """For each prompt token, its log-probability; None for the first one, which nothing precedes,
    and for those before `prompt_logprobs_from`."""
    prompt_top_logprobs: list[dict[int, float] | None] = field(default_factory=list)
    """For each prompt token, the likeliest tokens in its place; None as in `prompt_logprobs`."""
    chunks: list[Chunk] = field(default_factory=list)
    """Its chunks in flight, in order of position."""
    is_running: bool = False
    """Whether it has been admitted, and not been preempted since."""
    num_scheduled_tokens: int = 0
    """Tokens, from the first on, that have entered the model or were found in the prefix cache."""
    num_computed_tokens: int = 0
    """Tokens, from the first on, that are through the model or were found in the prefix cache."""
    finish_reason: FinishReason | None = None
    """Why it ended; None while it goes on."""
    uniforms: list[float] = field(default_factory=list)
    """Random numbers in [0, 1) for its next tokens, as far as they are drawn: a token whose step is
    repeated after a preemption gets the same one."""
    prefix_node: PrefixNode | None = None
    """Node of its longest prefix that the prefix cache knows; None: no prefix."""
    can_extend_prefix: bool = True
    """Whether its further tokens may still be added to the prefix cache."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache instead of being computed."""

    def __post_init__(self) -> None:
        unscored = range(min(self.params.prompt_logprobs_from, self.num_prompt_tokens))
        if self.params.prompt_logprobs:
            self.prompt_logprobs = [None for _ in unscored]
        if self.params.reports_prompt_top:
            self.prompt_top_logprobs = [None for _ in unscored]

    @property
    def page_tables(self) -> list[PageTable]:
        """Its page tables: that of the unshared layers, if any, then one for each depth."""
        unshared = [] if self.unshared_table is None else [self.unshared_table]
        return [*unshared, *self.depth_tables]

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_remaining(self) -> int:
        """Tokens that it may still generate."""
        return self.params.max_tokens - self.num_output_tokens

    @property
    def num_unscheduled_tokens(self) -> int:
        """Known tokens that have not entered the model yet."""
        return len(self.token_ids) - self.num_scheduled_tokens

    @property
    def prefix_namespace(self) -> tuple[int, int]:
        """Key of its prefixes: only sequences with the same recursion limits can share entries."""
        return self.min_recursions, self.max_recursions

    def count_kv_entries(self, counts: Sequence[int]) -> list[int]:
        """For each of its page tables, the entries of tokens with these recursion counts."""
        unshared = [] if self.unshared_table is None else [len(counts)]
        depths = range(len(self.depth_tables))
        if len(depths) == 1:
            return [*unshared, len(counts)]  # all depths share one: an entry for every token
        # A token that took c passes has entries at depths 0 .. c - 1.
        return unshared + [sum(c > depth for c in counts) for depth in depths]

    def uniform(self, ahead: int = 0) -> float:
        """Random number in [0, 1) for the next token, or one further ahead; greedy has none."""
        if self.params.temperature == 0:
            return 0.0
        while len(self.uniforms) <= ahead:
            self.uniforms.append(self.rng.random())
        return self.uniforms[ahead]

    def append(self, token: int, logprob: float, top_logprobs: dict[int, float]) -> None:
        """Add a sampled token, and use up its random number."""
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if self.params.logprobs is not None:
            self.top_logprobs.append(top_logprobs)
        del self.uniforms[:1]

    def record_prompt_logprobs(
        self, first: int, logprobs: Sequence[float], top_logprobs: Sequence[dict[int, float]]
    ) -> None:
        """Keep the log-probabilities of the prompt's tokens from position `first` on."""
        stop = first + len(logprobs)
        self.prompt_logprobs[first:stop] = logprobs
        if self.params.reports_prompt_top:
            self.prompt_top_logprobs[first:stop] = top_logprobs

    def to_completion(self, text: str) -> Completion:
        """Its `Completion` as far as it has come; `text` is that of its generated tokens."""
        output = self.output_token_ids
        return Completion(
            prompt_token_ids=self.prompt_token_ids,
            prompt_recursion_counts=self.recursion_counts[: self.num_prompt_tokens],
            num_cached_tokens=self.num_cached_tokens,
            index=self.index,
            text=text,
            token_ids=output,
            # Of the position that produced each token: the prompt's last one produced the first.
            recursion_counts=self.recursion_counts[self.num_prompt_tokens - 1 :][: len(output)],
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            prompt_logprobs=self.prompt_logprobs,
            prompt_top_logprobs=self.prompt_top_logprobs,
            finish_reason=self.finish_reason,
        )

    def reset(self) -> None:
        """Give back its pages and chunks, so that all its tokens are computed again later."""
        for table in self.page_tables:
            table.clear()
        self.chunks.clear()
        self.num_scheduled_tokens = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens = 0
        self.prefix_node = None
        self.can_extend_prefix = True


@dataclass(frozen=True, kw_only=True)
class TokenOutput:
    """A generated token, as `LLM.step` and `LLM.stream` give it to their caller."""

    request_id: str
    index: int
    """Which of the request's `n` completions it belongs to."""
    token_id: int
    text: str
    """What the token adds to the text; a token may add nothing yet, e.g. half of a character."""
    logprob: float
    """Of the token, under the model: before penalties, temperature and truncation."""
    recursion_count: int
    """Recursions of the position that produced the token."""
    top_logprobs: dict[int, float] = field(default_factory=dict)
    """The likeliest tokens in its place, as many as were asked for."""
    prompt: Completion | None = None
    """With the first token of a completion: what came of its prompt (counts, log-probabilities)."""
    finish_reason: FinishReason | None = None
    """Why its completion ended, if it is the last token of one."""
    completions: list[Completion] | None = None
    """All of the request's completions, with the last token of the last one."""
