"""`compute_usage`: the tokens of a request, and the FLOPs that routing saved in it."""

from collections import Counter
from collections.abc import Sequence

from mor.model.config import MoRConfig
from mor.model.cost import depth_fractions_of, sequence_flops
from mor.model.sampling import Completion
from mor.serve.openai.protocol import Usage


def compute_usage(
    config: MoRConfig, completions: Sequence[Completion], *, only_scores: bool
) -> Usage:
    """The `usage` of a client's request.

    Args:
        completions: all completions of all its prompts.
        only_scores: the prompts were only scored: the one token that the engine generated for each
            is neither shown nor counted.
    """
    outputs = [count for c in completions if not only_scores for count in c.recursion_counts]
    spent = 0.0  # FLOPs at the counts that routing gave the tokens
    full = 0.0  # FLOPs if every token had taken all recursions
    for completion in completions:
        # An output token's count is that of the position before it, which computed it. The first
        # one's is thus the prompt's last count again, and the last token never went through.
        counts = [*completion.prompt_recursion_counts, *completion.recursion_counts[1:]]
        spent += _flops(config, counts)
        full += _flops(config, [config.num_recursions] * len(counts))
    # A prompt counts once, however many completions it has.
    prompt_tokens = sum(len(c.prompt_token_ids) for c in completions if c.index == 0)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=len(outputs),
        total_tokens=prompt_tokens + len(outputs),
        mean_recursions=round(sum(outputs) / len(outputs), 6) if outputs else None,
        flops_saved=round(1 - spent / full, 6) if full else 0.0,
    )


def _flops(config: MoRConfig, counts: Sequence[int]) -> float:
    """Forward FLOPs of a sequence, given the recursion count of each of its tokens."""
    numbers = Counter(counts)
    histogram = [numbers[count] for count in range(config.num_recursions + 1)]
    depth_fractions = depth_fractions_of(config, histogram)
    return len(counts) * sequence_flops(config, len(counts), depth_fractions=depth_fractions).mean
