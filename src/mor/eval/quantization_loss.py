"""Loss with rounded (quantized) weights, and the recursion counts that rounding changes."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel

_SEQUENCES = 16


@dataclass(frozen=True, kw_only=True)
class QuantizationLoss:
    """Results on the same tokens with the model's own weights and with rounded ones."""

    tokens: int
    """Predicted tokens."""
    nll: float
    """Mean over predicted tokens, in nats, under the causal `threshold` rule."""
    nll_rounded: float
    """The same with rounded weights."""
    changed_counts: float
    """Share of tokens whose recursion count differs."""

    def as_dict(self) -> dict[str, float]:
        """The fields, and `nll_cost` = nll_rounded - nll, for JSON."""
        return {**asdict(self), "nll_cost": self.nll_rounded - self.nll}


def quantization_loss(
    model: MoRModel, batches: Iterable[Tensor], rounded: EngineConfig
) -> QuantizationLoss:
    """Losses of the same windows in two engines, with the model's own weights and rounded ones.

    Args:
        batches: (B, T + 1) windows of token ids.
        rounded: config of the second engine, with `quantization` or a `dtype`.

    Raises:
        ConfigError: the model or this machine cannot run with that config.
    """
    max_length = model.config.max_position_embeddings - 1  # one token is generated
    prompts = [row[:max_length] for batch in batches for row in batch.tolist()]
    plain = EngineConfig(max_num_seqs=_SEQUENCES, enable_prefix_caching=False)
    both = [_read(model, prompts, config) for config in (plain, rounded)]
    scores = [[s for d in side for s in d.prompt_logprobs if s is not None] for side in both]
    predicted = max(1, len(scores[0]))
    counts = [[c for d in side for c in d.prompt_recursion_counts] for side in both]
    changed = sum(a != b for a, b in zip(*counts, strict=True))
    return QuantizationLoss(
        tokens=len(scores[0]),
        nll=-sum(scores[0]) / predicted,
        nll_rounded=-sum(scores[1]) / predicted,
        changed_counts=changed / max(1, len(counts[0])),
    )


def _read(
    model: MoRModel, prompts: Sequence[Sequence[int]], config: EngineConfig
) -> list[Completion]:
    params = SamplingParams(max_tokens=1, prompt_logprobs=True, ignore_eos=True)
    return LLM(model, config).generate(prompts, params)
