"""`RunFolder`: the settings and measurements in a folder that `mor train` has written."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mor.errors import DataError
from mor.eval.depth import mean_recursions
from mor.io.checkpoint import load_config, newest_step
from mor.model.config import MoRConfig
from mor.model.cost import num_parameters, num_parameters_non_embedding, sequence_flops
from mor.train.config import TrainConfig
from mor.train.metrics_file import MetricsFile
from mor.yaml_config import read_yaml

Row = dict[str, Any]
"""A line of `metrics.jsonl`."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A training run, finished or not, as its folder tells it."""

    name: str
    """Of the run in reports."""
    folder: Path
    config: TrainConfig
    """From `config.yaml`."""
    model: MoRConfig
    rows: Sequence[Row]
    """The lines of `metrics.jsonl`, one for each step; at least one."""

    @classmethod
    def open(cls, folder: Path, name: str = "") -> "RunFolder":
        """Read a folder; its run may still go on.

        Args:
            name: of the run in reports; the folder's own if empty.

        Raises:
            DataError: it is no folder of a run, or its run has not measured anything yet.
        """
        file = folder / "metrics.jsonl"
        rows = MetricsFile(file).rows()
        if not rows or not (folder / "config.yaml").is_file():
            raise DataError(
                f"{folder} is no run with measurements (no lines in {file.name}, or no "
                "config.yaml): give folders that `mor train --out` has written to."
            )
        config = TrainConfig.from_dict(read_yaml(folder / "config.yaml"))
        model = load_config(folder) if newest_step(folder) else config.model_config()
        return cls(name=name or folder.name, folder=folder, config=config, model=model, rows=rows)

    @property
    def evaluations(self) -> list[Row]:
        """The lines that hold an evaluation."""
        return [row for row in self.rows if "nll_threshold" in row]

    @property
    def finished(self) -> bool:
        """Whether the last step is done, evaluated and saved."""
        last, newest = self.rows[-1], newest_step(self.folder)
        is_over = last["step"] == last.get("total_steps", self.config.steps) and "nll_topk" in last
        return is_over and newest is not None and newest.name == f"step-{last['step']:08d}"

    @property
    def command(self) -> str:
        """A command that repeats this run in another folder."""
        return f"mor train {self.folder / 'config.yaml'} --out {self.folder}-again"

    def summary(self) -> Row:
        """The run's final numbers by name; None for what was not measured."""
        last = self.rows[-1]
        final = next(reversed(self.evaluations), {})
        seconds = sum(row["step_s"] for row in self.rows)
        histogram = final.get("depth_histogram")
        utilization = [row["mfu"] for row in self.rows if row.get("mfu")]
        return {
            "steps": last["step"],
            "tokens": last["tokens"],
            "training_flops": last.get("flops"),
            "parameters": num_parameters(self.model),
            "parameters_non_embedding": num_parameters_non_embedding(self.model),
            "flops_per_token": sequence_flops(self.model, self.config.sequence_length).mean,
            "train_loss": statistics.fmean(row["loss"] for row in self.rows[-20:]),
            **{k: final.get(k) for k in ("nll_topk", "nll_threshold", "nll_gap")},
            **{k: final.get(k) for k in ("router_accuracy", "dead_share")},
            "depth_histogram": histogram,
            "mean_recursions": mean_recursions(histogram) if histogram else None,
            "step_seconds": seconds,
            "tokens_per_s": last["tokens"] / seconds,
            "mfu": statistics.median(utilization) if utilization else None,
            "memory_bytes": last.get("memory_bytes"),
        }
