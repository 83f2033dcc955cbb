"""A few runs side by side: a table, and the page that `mor demo` writes."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mor.eval.depth import mean_recursions
from mor.report.html import ColoredText, Section, Series, Table, bar_chart, line_chart, page

_SMOOTHING = 0.95  # weight of the past in the moving average of the training loss


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run cost and how good its model is."""

    name: str
    parameters: int
    parameters_non_embedding: int
    flops_per_token: float
    """Forward pass, mean over the tokens of a sequence of the training length."""
    training_flops: float
    """FLOPs of the whole run."""
    tokens: int
    """Tokens that were trained on."""
    seconds: float
    """Time in training steps, without evaluations and saves."""
    memory_bytes: int
    """Weights, gradients, AdamW's moments and what the forward pass keeps for the backward pass."""
    nll_topk: float
    """Nats per validation token, under the selection rule of training."""
    nll_threshold: float
    """Nats per validation token, under the causal rule of generation."""
    depth_histogram: tuple[float, ...]
    """(R + 1,) shares of validation tokens by recursion count, from 0 on."""
    kv_bytes_per_token: float
    """Bytes of keys and values, 2 for each value, at this depth histogram."""
    generated_per_s: float
    """Tokens per second of the reference generator."""
    curve: tuple[tuple[int, float], ...]
    """(tokens, training loss) of each step."""

    def as_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunSummary":
        """The summary in a JSON object that `as_dict` has made."""
        values = dict(values)
        values["depth_histogram"] = tuple(values["depth_histogram"])
        values["curve"] = tuple((int(x), float(y)) for x, y in values["curve"])
        return cls(**values)

    @property
    def mean_recursions(self) -> float:
        """Mean recursion count of a validation token."""
        return mean_recursions(self.depth_histogram)


_ROWS: tuple[tuple[str, Callable[[RunSummary], str]], ...] = (
    ("parameters", lambda r: f"{r.parameters / 1e6:.2f}M"),
    ("  no embedding", lambda r: f"{r.parameters_non_embedding / 1e6:.2f}M"),
    ("FLOPs per token", lambda r: f"{r.flops_per_token / 1e6:.2f}M"),
    ("training FLOPs", lambda r: f"{r.training_flops / 1e12:.2f}T"),
    ("tokens seen", lambda r: f"{r.tokens:,}"),
    ("training time", lambda r: f"{r.seconds:.0f} s"),
    ("training memory", lambda r: f"{r.memory_bytes / 2**20:.0f} MiB"),
    ("NLL, topk", lambda r: f"{r.nll_topk:.4f}"),
    ("NLL, threshold", lambda r: f"{r.nll_threshold:.4f}"),
    ("recursions", lambda r: depths(r.depth_histogram)),
    ("mean recursions", lambda r: f"{r.mean_recursions:.2f}"),
    ("KV bytes per token", lambda r: f"{r.kv_bytes_per_token:,.0f}"),
    ("tokens/s generating", lambda r: f"{r.generated_per_s:.1f}"),
)


def depths(histogram: Sequence[float]) -> str:
    """A depth histogram as a short text, such as `1:34% 2:33% 3:33%`."""
    shown = [(i, share) for i, share in enumerate(histogram) if i > 0 or share > 0]
    return " ".join(f"{i}:{share:.0%}" for i, share in shown)


def comparison_rows(runs: Sequence[RunSummary]) -> list[list[str]]:
    """Rows of a table: what is compared, then its value in each run."""
    return [[label, *(show(run) for run in runs)] for label, show in _ROWS]


def smoothed(curve: Sequence[tuple[int, float]]) -> list[float]:
    """Exponential moving average of a curve's values, without a bias towards the first one.

    Args:
        curve: pairs of x and value.
    """
    average = 0.0
    weight = 0.0  # sum of the weights so far, which approaches 1; Adam's bias correction
    out: list[float] = []
    for _, loss in curve:
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        weight = _SMOOTHING * weight + (1 - _SMOOTHING)
        out.append(average / weight)
    return out


def report_page(
    runs: Sequence[RunSummary],
    sample: ColoredText,
    *,
    title: str,
    subtitle: str,
    verdict: str,
    footer: str,
) -> str:
    """A self-contained HTML page that compares the runs.

    Args:
        sample: a generated text.
        verdict: a sentence below the table.
    """
    table = Table(columns=["", *(r.name for r in runs)], rows=comparison_rows(runs))
    by_tokens = [
        Series(name=r.name, xs=[x for x, _ in r.curve], ys=smoothed(r.curve)) for r in runs
    ]
    by_flops = [
        Series(
            name=r.name,
            xs=[x * r.training_flops / r.tokens / 1e12 for x, _ in r.curve],
            ys=smoothed(r.curve),
        )
        for r in runs
    ]
    deepest = max(len(r.depth_histogram) for r in runs)
    routed = [r for r in runs if len(r.depth_histogram) > 2]
    bars = bar_chart(
        "Share of validation tokens by recursion count",
        [str(i) for i in range(1, deepest)],
        [(r.name, r.depth_histogram[1:]) for r in routed],
        x_label="recursion count",
    )
    curves = line_chart(
        "Training loss by training FLOPs", "TFLOPs", "nats per token", by_flops
    ) + line_chart("Training loss by tokens", "tokens", "nats per token", by_tokens)
    sections = [
        Section(heading="Side by side", body_html=table.html(), note=verdict),
        Section(heading="Loss", body_html=curves, note="Moving averages over about 20 steps."),
        Section(heading="Depth", body_html=bars, note="Under the causal threshold rule."),
        Section(
            heading="A sample",
            body_html=sample.html(),
            note="A generated token's color is the number of recursions that produced it.",
        ),
    ]
    return page(title, subtitle, sections, footer)
