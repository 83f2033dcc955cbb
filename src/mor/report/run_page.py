"""The page of `mor report`: final numbers and curves of one training run or several."""

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mor.errors import DataError
from mor.report.comparison import depths, smoothed
from mor.report.html import Section, Series, Table, bar_chart, line_chart, page, tabs
from mor.report.run_folder import Row, RunFolder

_POINTS = 400  # of a line at most; more cannot be seen
_START = 0.25  # share of a run that a loss chart may cut off: its steep fall would flatten the rest

_NUMBERS: Mapping[str, tuple[str, Callable[[Any], str]]] = MappingProxyType(
    {
        "parameters": ("parameters", lambda v: f"{v / 1e6:.2f}M"),
        "parameters_non_embedding": ("no embedding", lambda v: f"{v / 1e6:.2f}M"),
        "flops_per_token": ("FLOPs per token, forward", lambda v: f"{v / 1e6:.2f}M"),
        "steps": ("steps", "{:,}".format),
        "tokens": ("tokens", "{:,}".format),
        "training_flops": ("training FLOPs", "{:.3g}".format),
        "step_seconds": ("time in steps", lambda v: f"{v:,.0f} s"),
        "train_loss": ("training loss, last 20 steps", "{:.4f}".format),
        "nll_topk": ("NLL, topk", "{:.4f}".format),
        "nll_threshold": ("NLL, threshold", "{:.4f}".format),
        "nll_gap": ("gap", "{:+.4f}".format),
        "depth_histogram": ("recursions", depths),
        "mean_recursions": ("mean recursions", "{:.2f}".format),
        "router_accuracy": ("router accuracy", "{:.1%}".format),
        "dead_share": ("dead positions", "{:.1%}".format),
        "tokens_per_s": ("tokens/s", "{:,.0f}".format),
        "mfu": ("model FLOPs utilization", "{:.1%}".format),
        "memory_bytes": ("memory", lambda v: f"{v / 2**20:,.0f} MiB"),
    }
)


def find_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Open the folders: a run's own, or an experiment's, which stands for all of its runs.

    Raises:
        DataError: a folder is neither.
    """
    found: list[Path] = []
    for folder in folders:
        inside = _inside(folder)
        found += [folder] if (folder / "metrics.jsonl").exists() or not inside else inside
    named = zip(found, _names(found), strict=True)
    return [RunFolder.open(folder, name) for folder, name in named]


def _inside(experiment: Path) -> list[Path]:
    """The runs' folders of an experiment, in the order of its results; none if it is none."""
    found = sorted(file.parent for file in experiment.glob("runs/*/metrics.jsonl"))
    try:
        results = json.loads((experiment / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return found
    order = {result["name"]: i for i, result in enumerate(results["runs"])}
    return sorted(found, key=lambda folder: order.get(folder.name, len(order)))


def _names(folders: Sequence[Path]) -> list[str]:
    """Names that tell the runs apart, in the order of their folders.

    They are the folders' own names; of `1m_mor2_seed0` and `1m_mor3_seed0` only `mor2` and `mor3`.
    """
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        return [str(folder) for folder in folders]
    parts = [name.split("_") for name in names]
    if len(names) == 1 or len({len(part) for part in parts}) > 1:
        return names
    differing = [i for i, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return [" ".join(part[i] for i in differing) for part in parts]


def run_report(runs: Sequence[RunFolder], footer: str) -> str:
    """The HTML page of the runs.

    Raises:
        DataError: there are none.
    """
    if not runs:
        raise DataError("there are no runs to report on.")
    sections = [
        Section(heading="Final numbers", body_html=_numbers(runs), note=_NUMBERS_NOTE),
        Section(heading="Training loss", body_html=_losses(runs), note=_LOSS_NOTE),
        Section(heading="Validation", body_html=_validation(runs), note=_VALIDATION_NOTE),
        Section(heading="Depth and routers", body_html=_routing(runs), note=_ROUTING_NOTE),
        Section(heading="Speed and memory", body_html=_speed(runs), note=_SPEED_NOTE),
        Section(heading="Optimization", body_html=_optimization(runs)),
        Section(heading="Commands", body_html=_commands(runs), note=_COMMANDS_NOTE),
    ]
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} training runs"
    texts = sorted({str(path) for run in runs for path, _ in run.config.corpora})
    return page(title, f"trained on {', '.join(texts)}", sections, footer)


_NUMBERS_NOTE = (
    "NLL in nats per token on the validation text, under both selection rules: topk looks ahead "
    "at the whole sequence, threshold is causal and what a user gets; the gap is their difference."
)
_LOSS_NOTE = (
    "Moving averages over about 20 steps. The first quarter of a run may lie above the chart."
)
_VALIDATION_NOTE = "The first evaluations may lie above the chart. Vanilla has one number for both."
_ROUTING_NOTE = (
    "Shares of validation tokens by recursion count under the threshold rule. Accuracy: how often "
    "both rules agree. Dead: positions that the deepest recursion never selects."
)
_SPEED_NOTE = (
    "Of the optimizer steps alone, moving averages. Utilization: the cost model's FLOPs per second "
    "over the rate of a large matrix product. Memory: the most in use so far."
)
_COMMANDS_NOTE = "Each config.yaml holds all settings of its run; the command repeats it beside it."


def _numbers(runs: Sequence[RunFolder]) -> str:
    """The table of final numbers: a column for each run, or a row if there are more than four."""
    summaries = [run.summary() for run in runs]
    keys = [k for k in _NUMBERS if any(s[k] is not None for s in summaries)]
    columns = [
        [_NUMBERS[key][0], *("" if s[key] is None else _NUMBERS[key][1](s[key]) for s in summaries)]
        for key in keys
    ]
    grid = [["", *(run.name for run in runs)], *columns]
    if len(runs) > 4:
        grid = [list(row) for row in zip(*grid, strict=True)]
    return Table(columns=grid[0], rows=grid[1:]).html()


def _losses(runs: Sequence[RunFolder]) -> str:
    """The same curves by each measure of progress."""

    def seconds(run: RunFolder) -> list[float]:
        return list(accumulate(row["step_s"] for row in run.rows))

    axes: dict[str, Callable[[RunFolder], Sequence[float]]] = {
        "tokens": lambda run: [row["tokens"] for row in run.rows],
        "FLOPs": lambda run: [row.get("flops") or math.nan for row in run.rows],
        "seconds": seconds,
        "steps": lambda run: [row["step"] for row in run.rows],
    }
    panels = []
    for label, xs in axes.items():
        series = [_thin(run.name, xs(run), _smooth(run, "loss")) for run in runs]
        chart = _loss_chart(f"Training loss by {label}", label, series)
        panels.append((label, chart))
    return tabs("loss", panels)


def _smooth(run: RunFolder, key: str) -> list[float]:
    return smoothed([(row["step"], row[key]) for row in run.rows])


def _validation(runs: Sequence[RunFolder]) -> str:
    titles = {"nll_threshold": "NLL, threshold (causal)", "nll_topk": "NLL, topk"}
    charts = [_loss_chart(t, "tokens", _evaluated(runs, key)) for key, t in titles.items()]
    routed = [run for run in runs if run.model.routing == "expert_choice"]
    if routed:
        gap = _evaluated(runs, "nll_gap", routed)
        charts.append(line_chart("What causality costs: threshold - topk", "tokens", "nats", gap))
    return "".join(charts)


def _evaluated(
    runs: Sequence[RunFolder], key: str, only: Sequence[RunFolder] | None = None
) -> list[Series]:
    """The evaluations' values of a key, a line for each run.

    Runs that are not in `only` get an empty line, so that a run has the same color in all charts.
    """
    series = []
    for run in runs:
        kept = run.evaluations if only is None or run in only else []
        rows = [row for row in kept if row.get(key) is not None]
        xs, ys = [row["tokens"] for row in rows], [row[key] for row in rows]
        series.append(Series(name=run.name, xs=xs, ys=ys))
    return series


def _loss_chart(title: str, x: str, series: Sequence[Series]) -> str:
    """A line chart whose y range is that of the runs' later three quarters."""
    later = [y for line in series for y in line.ys[int(_START * len(line.ys)) :]]
    later = [y for y in later if math.isfinite(y)]
    low, high = min(later, default=0.0), max(later, default=0.0)
    margin = 0.04 * (high - low)
    shown = (low - margin, high + margin) if margin else None
    return line_chart(title, x, "nats per token", series, y_range=shown)


def _routing(runs: Sequence[RunFolder]) -> str:
    deep = [run for run in runs if run.model.num_recursions > 1 and run.evaluations]
    charts = []
    if deep:
        maximum = max(run.model.num_recursions for run in deep)
        counts = range(1, maximum + 1)
        finals = [(run.name, run.evaluations[-1]["depth_histogram"]) for run in deep]
        bars = [
            (name, [*shares[1:], *[math.nan] * (maximum + 1 - len(shares))])
            for name, shares in finals
        ]
        title = "Share of validation tokens by recursion count, at the end"
        charts.append(bar_chart(title, [str(c) for c in counts], bars, x_label="recursion count"))
    for key, title in (("router_accuracy", "Router accuracy"), ("dead_share", "Dead positions")):
        series = _evaluated(runs, key)
        if any(line.xs for line in series):
            shown = None if any(y for line in series for y in line.ys) else (0.0, 1.0)
            charts.append(line_chart(title, "tokens", "share", series, y_range=shown))
    charts += [_histogram(run) for run in deep if run.model.routing != "none"]
    return "".join(charts) or "<p>No run has more than one recursion.</p>"


def _histogram(run: RunFolder) -> str:
    """Depth shares of one run over its evaluations: a line for each recursion count."""
    rows = run.evaluations
    tokens = [row["tokens"] for row in rows]
    series = [
        Series(name=f"count {count}", xs=tokens, ys=[r["depth_histogram"][count] for r in rows])
        for count in range(1, run.model.num_recursions + 1)
    ]
    return line_chart(
        f"Depths over time: {run.name}", "tokens", "share", series, y_range=(0, 1), height=260
    )


def _speed(runs: Sequence[RunFolder]) -> str:
    pace = []
    for run in runs:
        curve = [(row["step"], run.config.tokens_per_step / row["step_s"]) for row in run.rows]
        pace.append(_thin(run.name, _tokens(run), smoothed(curve)))
    charts = [line_chart("Tokens per second", "tokens", "tokens/s", pace)]
    if all("mfu" in row for run in runs for row in run.rows):
        mfu = [_thin(run.name, _tokens(run), _smooth(run, "mfu")) for run in runs]
        charts.append(line_chart("Model FLOPs utilization", "tokens", "share of the peak", mfu))
    memory = [_column(run, "memory_bytes", 1 / 2**20) for run in runs]
    charts.append(line_chart("Memory", "tokens", "MiB", memory))
    return "".join(charts)


def _optimization(runs: Sequence[RunFolder]) -> str:
    norm = [_thin(run.name, _tokens(run), _smooth(run, "grad_norm")) for run in runs]
    rate = [_column(run, "lr") for run in runs]
    return line_chart("Gradient norm before clipping", "tokens", "", norm) + line_chart(
        "Learning rate", "tokens", "", rate
    )


def _tokens(run: RunFolder) -> list[float]:
    return [row["tokens"] for row in run.rows]


def _column(run: RunFolder, key: str, scale: float = 1.0) -> Series:
    values = [_number(row, key) * scale for row in run.rows]
    return _thin(run.name, _tokens(run), values)


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return math.nan if value is None else value


def _thin(name: str, xs: Sequence[float], ys: Sequence[float]) -> Series:
    """A line of at most 400 points, which are means of as many stretches, and its last point."""
    width = -(-len(xs) // _POINTS)
    if width <= 1:
        return Series(name=name, xs=xs, ys=ys)
    starts = range(0, len(xs), width)
    means = ([statistics.fmean(v[i : i + width]) for i in starts] for v in (xs, ys))
    mean_xs, mean_ys = means
    return Series(name=name, xs=[*mean_xs, xs[-1]], ys=[*mean_ys, ys[-1]])


def _commands(runs: Sequence[RunFolder]) -> str:
    return Table(columns=["run", "command"], rows=[[run.name, run.command] for run in runs]).html()
