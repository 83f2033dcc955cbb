"""The results of an experiment: `results.md` for people, `results.json` for programs, a plot."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from mor.experiments.experiment import Experiment, PlannedRun
from mor.io.atomic_files import write_file
from mor.machine import machine
from mor.model.cost import num_parameters_non_embedding
from mor.report.charts import Series, line_chart
from mor.report.comparison import depths
from mor.report.run_folder import RunFolder
from mor.train.budget import Budget

Result = dict[str, Any]
"""One run's entry in `results.json`; `status` alone tells what is not done."""


class GroupKey(NamedTuple):
    """What the runs of a group have in common; they differ in the seed."""

    size: str
    budget: str
    variant: str


def collect(experiment: Experiment, out: Path, failures: Mapping[str, str]) -> list[Result]:
    """One result per planned run; what is not finished has a status and no numbers.

    Args:
        failures: messages of the runs that failed, by name.
    """
    found = []
    for planned_run in experiment.runs:
        folder = out / "runs" / planned_run.name
        result: Result = {
            "name": planned_run.name,
            "variant": planned_run.variant,
            "size": planned_run.size,
            "budget": planned_run.budget,
            "seed": planned_run.seed,
            "status": failures.get(planned_run.name, planned_run.state(folder)),
        }
        if result["status"] == "done":
            run = RunFolder.open(folder, planned_run.name)
            result |= {**run.summary(), "command": run.command, "curve": _curve(run)}
        found.append(result)
    _compare(found, "vs_random", lambda variant: experiment.twins.get(variant))
    _compare(found, "vs_baseline", lambda variant: experiment.baseline)
    return found


def _curve(run: RunFolder) -> list[tuple[float, float]]:
    """(training FLOPs, NLL under `threshold`) of each evaluation."""
    return [(row.get("flops") or row["tokens"], row["nll_threshold"]) for row in run.evaluations]


def _compare(found: list[Result], key: str, other: Callable[[str], str | None]) -> None:
    """Add to each result, as `key`, its causal NLL minus that of another variant's run.

    The other run has the same size, budget and seed; `other` names its variant.
    """
    by_place = {(r["variant"], r["size"], r["budget"], r["seed"]): r for r in found}
    for result in found:
        place = (result["size"], result["budget"], result["seed"])
        theirs = by_place.get((other(result["variant"]) or "", *place), {})
        if theirs is not result and "nll_threshold" in result and "nll_threshold" in theirs:
            result[key] = result["nll_threshold"] - theirs["nll_threshold"]


def write(experiment: Experiment, out: Path, command: str, failures: Mapping[str, str]) -> bool:
    """Write `results.json`, `results.md` and `plot.svg`; returns whether every run is done.

    Raises:
        CapacityError, DataError: they cannot be written.
    """
    found = collect(experiment, out, failures)
    complete = all(result["status"] == "done" for result in found)
    where = {**machine(), "command": command}
    values = {
        "experiment": experiment.name,
        "about": experiment.about,
        "complete": complete,
        "machine": where,
        "runs": found,
        "settings": {
            run.name: json.loads(json.dumps(asdict(run.config), default=str))
            for run in experiment.runs
        },
    }
    write_file(out / "results.json", (json.dumps(values, indent=1) + "\n").encode())
    write_file(out / "plot.svg", plot(experiment, found).encode())
    write_file(out / "results.md", markdown(experiment, found, where).encode())
    return complete


def groups(found: Sequence[Result]) -> dict[GroupKey, list[Result]]:
    """Finished runs by size, budget and variant; a group holds one run per seed."""
    grouped: dict[GroupKey, list[Result]] = {}
    for result in found:
        if result["status"] == "done":
            key = GroupKey(result["size"], result["budget"], result["variant"])
            grouped.setdefault(key, []).append(result)
    # Sizes and budgets as in the grid, also where the first variants of one are not done.
    order = {key: i for i, key in enumerate(dict.fromkeys((r["size"], r["budget"]) for r in found))}
    return dict(sorted(grouped.items(), key=lambda item: order[item[0][:2]]))


# -- the table --------------------------------------------------------------------------------


def _count(value: float) -> str:
    return f"{value / 1e6:.2f}M"


def _flops(value: float) -> str:
    return f"{value:.3g}"


_COLUMNS: Mapping[str, tuple[str, Callable[[Any], str]]] = MappingProxyType(
    {
        "parameters": ("parameters", _count),
        "parameters_non_embedding": ("no embedding", _count),
        "tokens": ("tokens", _count),
        "training_flops": ("FLOPs", _flops),
        "nll_topk": ("NLL topk", "{:.4f}".format),
        "nll_threshold": ("NLL threshold", "{:.4f}".format),
        "nll_gap": ("gap", "{:+.4f}".format),
        "vs_random": ("vs random", "{:+.4f}".format),
        "vs_baseline": ("vs baseline", "{:+.4f}".format),
        "depth_histogram": ("recursions", depths),
        "router_accuracy": ("accuracy", "{:.1%}".format),
        "dead_share": ("dead", "{:.1%}".format),
    }
)
_PER_SEED = ("nll_topk", "nll_threshold", "nll_gap", "vs_random", "vs_baseline", "depth_histogram")


def rows(found: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of means over seeds, without columns that are empty."""
    grouped = groups(found)
    filled = [k for k in _COLUMNS if any(r.get(k) is not None for g in grouped.values() for r in g)]
    many_sizes = len({key.size for key in grouped}) > 1
    header = ["variant", *(["size"] if many_sizes else []), "budget", "seeds"]
    lines = []
    for key, group in grouped.items():
        line = [key.variant, *([key.size] if many_sizes else []), key.budget, str(len(group))]
        lines.append([*line, *(_mean(k, [r.get(k) for r in group]) for k in filled)])
    return [*header, *(_COLUMNS[k][0] for k in filled)], lines


def _mean(key: str, values: Sequence[Any]) -> str:
    """The mean over seeds, and with several seeds the standard deviation of the losses."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    show = _COLUMNS[key][1]
    if key == "depth_histogram":
        return show([statistics.fmean(column) for column in zip(*known, strict=True)])
    text = show(statistics.fmean(known))
    spread = key in ("nll_topk", "nll_threshold") and len(known) > 1
    return f"{text} ± {statistics.stdev(known):.4f}" if spread else text


def markdown(experiment: Experiment, found: Sequence[Result], where: Mapping[str, object]) -> str:
    """The text of `results.md`.

    Args:
        where: `machine()` and the command.
    """
    done = [r for r in found if r["status"] == "done"]
    baseline = f'; "vs baseline" is against `{experiment.baseline}`' if experiment.baseline else ""
    parts = [
        f"# {experiment.name}",
        experiment.about,
        f"{len(done)} of {len(found)} runs are done. {where['cpu']}, threads: {where['threads']}, "
        f"GPU: {where['gpu'] or 'none'}; torch {where['torch']}, commit {where['commit']}:",
        f"    {where['command']}",
        "Validation NLL in nats per token, under both selection rules: `topk` looks ahead, "
        "`threshold` is causal, and the gap is their difference. Means over seeds, with the "
        "standard deviation. Differences are of the causal NLL, paired by seed; below 0 is better. "
        f'"vs random" is against random routing at equal capacity{baseline}.',
        _table(*rows(found)),
        "![NLL](plot.svg)",
        "## By seed",
        _table(*_by_seed(done)),
    ]
    if len(done) < len(found):
        parts += ["## Not done", *(f"- {r['name']}: {r['status']}" for r in found if r not in done)]
    commands = "\n".join(f"    {r['command']}" for r in done)
    parts += ["## Single runs", "What repeats each of them:", commands]
    return "\n\n".join(part for part in parts if part) + "\n"


def _by_seed(done: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    filled = [k for k in _PER_SEED if any(r.get(k) is not None for r in done)]
    lines = []
    for result in done:
        line = [result["name"]]
        for key in filled:
            value, show = result.get(key), _COLUMNS[key][1]
            line.append("" if value is None else show(value))
        lines.append(line)
    return ["run", *(_COLUMNS[key][0] for key in filled)], lines


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    split = ["---"] * len(header)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, split, *lines))


# -- the plot ---------------------------------------------------------------------------------


def plot(experiment: Experiment, found: Sequence[Result]) -> str:
    """Causal NLL over size where there are several, else over budget, else along the training."""
    grouped = groups(found)
    sizes, budgets = {key.size for key in grouped}, {key.budget for key in grouped}
    y_label = "validation NLL (threshold), nats per token"
    if len(sizes) > 1:
        named_by = ("variant", "budget") if len(budgets) > 1 else ("variant",)
        lines = _final_losses(grouped, "parameters_non_embedding", named_by)
        return _chart(experiment, "parameters without embedding", y_label, lines)
    if len(budgets) > 1:
        lines = _final_losses(grouped, "training_flops", ("variant",))
        return _chart(experiment, "training FLOPs", y_label, lines)
    series = []
    for key, group in grouped.items():
        # Means over seeds of each evaluation; a shorter curve ends the line.
        points = list(zip(*(r["curve"] for r in group), strict=False))
        xs = [statistics.fmean(x for x, _ in point) for point in points]
        ys = [statistics.fmean(y for _, y in point) for point in points]
        dashed = key.variant in _twins(experiment)
        series.append(Series(name=key.variant, xs=xs, ys=ys, dashed=dashed))
    return line_chart(experiment.name, "training FLOPs", y_label, series, height=380)


def _twins(experiment: Experiment) -> set[str]:
    """The variants with random routing, whose lines are dashed."""
    return set(experiment.twins.values())


def _final_losses(
    grouped: Mapping[GroupKey, list[Result]], x: str, named_by: tuple[str, ...]
) -> dict[str, list[tuple[float, float]]]:
    """A line's points (x, causal NLL at the end) by its name, each a mean over seeds.

    Args:
        x: field of the results on the horizontal axis.
        named_by: fields of the group whose values name a line.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for key, group in grouped.items():
        mean = statistics.fmean(r["nll_threshold"] for r in group)
        line = lines.setdefault(", ".join(getattr(key, name) for name in named_by), [])
        line.append((statistics.fmean(r[x] for r in group), mean))
    return lines


def _chart(
    experiment: Experiment, x: str, y: str, lines: Mapping[str, list[tuple[float, float]]]
) -> str:
    series = []
    for name, points in lines.items():
        xs, ys = zip(*sorted(points), strict=True)
        dashed = name.split(", ")[0] in _twins(experiment)
        series.append(Series(name=name, xs=xs, ys=ys, dashed=dashed))
    return line_chart(experiment.name, x, y, series, height=380, log_x=True)


def planned(runs: Sequence[PlannedRun]) -> list[list[str]]:
    """A row per run for people: name, steps, parameters without embedding, FLOPs.

    With a budget of time steps and FLOPs are empty.
    """
    lines = []
    for run in runs:
        timed = Budget.parse(run.budget).unit == "seconds"
        steps, flops = ("", "") if timed else (str(run.config.steps), _flops(run.flops))
        lines.append([run.name, steps, _count(num_parameters_non_embedding(run.model)), flops])
    return lines
