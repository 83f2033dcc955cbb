"""What a request cost, and what routing spared."""

from collections import Counter
from collections.abc import Sequence

from mor.model.config import MoRConfig
from mor.model.cost import depth_fractions_of, sequence_flops
from mor.model.sampling import Completion
from mor.serve.openai.protocol import Usage


def compute_usage(config: MoRConfig, completions: Sequence[Completion], *, scored: bool) -> Usage:
    """Usage of a client's request.

    Args:
        completions: all of it.
        scored: whether the prompts were only scored; their next token then does not count.
    """
    outputs = [count for c in completions if not scored for count in c.recursion_counts]
    spent, full = 0.0, 0.0
    for completion in completions:
        # The last token of the output never went through the model.
        counts = [*completion.prompt_recursion_counts, *completion.recursion_counts[1:]]
        spent += _flops(config, counts)
        full += _flops(config, [config.num_recursions] * len(counts))
    prompt_tokens = sum(len(c.prompt_token_ids) for c in completions if c.index == 0)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=len(outputs),
        total_tokens=prompt_tokens + len(outputs),
        mean_recursions=round(sum(outputs) / len(outputs), 6) if outputs else None,
        flops_saved=round(1 - spent / full, 6) if full else 0.0,
    )


def _flops(config: MoRConfig, counts: Sequence[int]) -> float:
    """Forward FLOPs of a sequence whose tokens took so many recursions."""
    numbers = Counter(counts)
    histogram = [numbers[count] for count in range(config.num_recursions + 1)]
    depth_fractions = depth_fractions_of(config, histogram)
    return len(counts) * sequence_flops(config, len(counts), depth_fractions=depth_fractions).mean
