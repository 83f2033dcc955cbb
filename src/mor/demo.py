"""`Demo`: training, measuring and generating end to end, on the standard library's source.

Trains a Mixture-of-Recursions model, its vanilla twin at equal training FLOPs, and the same model
with random routing at equal tokens; measures them side by side; generates colored text.

The output folder holds `data/` (the corpus), `mor/`, `vanilla/` and `random/` (the runs),
`demo.json` (the plan, then the measurements) and `report.html`. Each stage leaves its result there,
so a demo that was interrupted goes on where it was.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from mor.bench.timing import timed
from mor.bench.train_ab import Stepper
from mor.data.corpus import build_from_documents
from mor.data.stdlib_corpus import stdlib_documents
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import CheckpointError, ConfigError
from mor.io.atomic_files import storage_error, write_file
from mor.io.checkpoint import load
from mor.io.tokenizer import Tokenizer
from mor.machine import machine
from mor.model.config import MoRConfig
from mor.model.cost import (
    depth_fractions_of,
    kv_bytes_per_token,
    num_parameters,
    num_parameters_non_embedding,
    sequence_flops,
    training_flops,
)
from mor.model.sampling import SamplingParams
from mor.model.transformer import MoRModel
from mor.report.comparison import RunSummary, comparison_rows, report_page
from mor.report.html import ColoredText
from mor.terminal.color import colored_text, depth_legend
from mor.terminal.training_progress import watched
from mor.train.config import TrainConfig
from mor.train.metrics_file import MetricsFile
from mor.train.trainer import Trainer

VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 256
BATCH_SIZE = 4
NAMES = ("MoR", "vanilla", "random routing")
_FOLDERS = ("mor", "vanilla", "random")
_PROMPT = "def read_config(path):\n"
# Time that is left for evaluation and generation: this share of all, and at least so many seconds.
_END_SHARE, _END_S = 0.15, 25.0
_MIN_STEPS = 20  # of each run, however little time there is
_ROUNDS = 3  # measurements in turns, of which the median counts


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One demo in one folder."""

    out: Path
    minutes: float
    """The time that all of it should take."""
    screen: Console

    # -- state: what earlier stages left ----------------------------------------------------------

    def _read(self) -> dict[str, Any]:
        """The state in `demo.json`: `minutes` and `steps` once planned, `runs` once measured."""
        path = self.out / "demo.json"
        if not path.exists():
            if self.out.exists() and any(self.out.iterdir()) and not (self.out / "data").exists():
                raise CheckpointError(
                    f"{self.out} holds something that is not a demo: choose another --out."
                )
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged: remove it to plan the demo anew.") from error

    def _write(self, state: dict[str, Any]) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            write_file(self.out / "demo.json", json.dumps(state, indent=1).encode())
        except OSError as error:
            raise storage_error(self.out, error, CheckpointError) from error

    # -- the stages -----------------------------------------------------------------------------

    def run(self) -> int:
        """Run all stages that are not done yet and show the result; returns the exit status."""
        started = time.monotonic()
        state = self._read()
        done = "runs" in state
        if done:
            self.screen.print(
                f"{self.out} is finished (it ran with --minutes {state['minutes']:g}); here is "
                "the result. Choose another --out to run again."
            )
        else:
            self._prepare_text()
            if "steps" not in state:
                left = self.minutes * 60 - (time.monotonic() - started)
                state |= {"minutes": self.minutes, "steps": self._plan(left)}
                self._write(state)
            if not self._train_all(state["steps"]):
                return 0
            state |= self._measure(state["steps"])
            self._write(state)
        self._show(state)
        return 0

    def _prepare_text(self) -> None:
        """Build the corpus, unless it is there."""
        corpus = self.out / "data"
        if (corpus / "index.json").is_file():
            return
        with self.screen.status("reading the standard library, training a tokenizer ..."):
            summary = build_from_documents(
                stdlib_documents(), corpus, train_tokenizer=VOCAB_SIZE, valid_fraction=0.01
            )
        self.screen.print(
            f"text: {summary.num_train_documents} files of the standard library, "
            f"{summary.num_train_tokens:,} tokens to train on; {summary.num_valid_documents} "
            f"files, {summary.num_valid_tokens:,} tokens held out; vocabulary {summary.vocab_size}."
        )

    def _plan(self, seconds: float) -> list[int]:
        """Optimizer steps of each run, in the order of NAMES, that fill the time together.

        Measured on a few steps of each model.
        """
        steppers = [
            Stepper(model_config(i), BATCH_SIZE, SEQUENCE_LENGTH) for i in range(len(NAMES))
        ]
        started = time.monotonic()
        with self.screen.status("measuring a few steps to plan the time ..."):
            rounds = [[timed(s.step) for s in steppers] for _ in range(1 + _ROUNDS)]
        measured = rounds[1:]  # the first one warms up
        step_s = [statistics.median(column) for column in zip(*measured, strict=True)]
        # Vanilla takes so many steps for one of MoR's, at equal FLOPs; random routing just as many.
        share = flops_per_token(0) / flops_per_token(1)
        left = seconds - (time.monotonic() - started)
        left = min(left * (1 - _END_SHARE), left - _END_S)
        steps = int(left / (step_s[0] + share * step_s[1] + step_s[2]))
        steps = max(_MIN_STEPS, steps)
        return [steps, round(steps * share), steps]

    def _train_all(self, steps: list[int]) -> bool:
        """Train every run that is not finished; False if the user asked to stop."""
        for i, name in enumerate(NAMES):
            config = train_config(i, steps[i], self.out / "data")
            with watched(self.screen, config) as (on_step, should_stop):
                trainer = Trainer(
                    config,
                    self.out / _FOLDERS[i],
                    resume="auto",
                    on_step=on_step,
                    should_stop=should_stop,
                )
                if trainer.step >= steps[i]:
                    continue
                at = f" from step {trainer.step}" if trainer.step else ""
                self.screen.print(f"[bold]{name}[/]: {steps[i]} steps{at}")
                if trainer.run() == "stopped":
                    self.screen.print(
                        "stopped and saved; the same command goes on from here: "
                        f"`mor demo --out {self.out}`."
                    )
                    return False
        return True

    def _measure(self, steps: list[int]) -> dict[str, Any]:
        """What `demo.json` gets at the end: machine, a summary of each run, a sample of MoR."""
        models = [load(self.out / folder) for folder in _FOLDERS]
        tokenizer = Tokenizer.load(self.out / "data")
        with self.screen.status("generating with each model in turns ..."):
            speeds = generation_speeds(models, tokenizer)
        runs = [
            summarize(i, models[i], self.out / _FOLDERS[i], steps[i], speeds[i])
            for i in range(len(NAMES))
        ]
        prompt = tokenizer.encode(_PROMPT)
        params = SamplingParams(max_tokens=160, temperature=0.7, top_p=0.95, seed=0)
        (sample,) = engine(models[0]).generate([prompt], params)
        return {
            "machine": machine(),
            "runs": [run.as_dict() for run in runs],
            "sample": {
                "token_ids": prompt + sample.token_ids,
                "counts": sample.prompt_recursion_counts + sample.recursion_counts,
                "prompt_tokens": len(prompt),
            },
        }

    # -- showing --------------------------------------------------------------------------------

    def _show(self, state: dict[str, Any]) -> None:
        """Print the comparison, the verdict and the sample, and write them to `report.html`."""
        runs = [RunSummary.from_dict(values) for values in state["runs"]]
        tokenizer = Tokenizer.load(self.out / "data")
        sample = state["sample"]
        pieces = tokenizer.pieces(sample["token_ids"])
        recursions = model_config(0).num_recursions
        # A row per quantity, a column per model.
        table = RichTable("", *NAMES, box=None, pad_edge=False)
        for column in table.columns[1:]:
            column.justify = "right"
        for row in comparison_rows(runs):
            table.add_row(*row)
        self.screen.print()
        self.screen.print(table, soft_wrap=False)
        self.screen.print(f"\n{verdict(runs)}\n")
        self.screen.print("a sample; each generated token as deep as it was computed:")
        self.screen.print(depth_legend(recursions), soft_wrap=True)
        self.screen.print(colored_text(pieces, sample["counts"], recursions), soft_wrap=True)
        # The same for a browser.
        page = report_page(
            runs,
            ColoredText(
                pieces=pieces,
                counts=sample["counts"],
                num_recursions=recursions,
                prompt_tokens=sample["prompt_tokens"],
            ),
            title="Mixture-of-Recursions next to its vanilla twin",
            subtitle=(
                f"{state['minutes']:g} minutes on {state['machine']['cpu']}, "
                f"{state['machine']['threads']} threads"
            ),
            verdict=verdict(runs),
            footer=f"mor demo, torch {state['machine']['torch']}",
        )
        try:
            write_file(self.out / "report.html", page.encode())
        except OSError as error:
            raise storage_error(self.out, error, CheckpointError) from error
        self.screen.print(
            f"\nreport: {self.out / 'report.html'}\nnext:\n"
            f"  mor generate {self.out / 'mor'} --prompt 'class Node:' --show-depth\n"
            f"  mor eval {self.out / 'mor'}\n  mor info {self.out / 'mor'}"
        )


def model_config(index: int) -> MoRConfig:
    """The config of one of the demo's models, numbered as in NAMES."""
    fields: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": SEQUENCE_LENGTH,
        # The paper's 0.02 and 0.1 learn too slowly for this width and a few hundred steps.
        "initializer_range": 0.05,
        "router_alpha": 1.0,
    }
    mor = MoRConfig.preset("demo", num_recursions=3, **fields)
    random = MoRConfig.preset("demo", num_recursions=3, router_type="random", **fields)
    return (mor, mor.vanilla_twin(), random)[index]


def train_config(index: int, steps: int, corpus: Path) -> TrainConfig:
    """The training config of one of the demo's models."""
    return TrainConfig(
        model=model_config(index).to_dict(),
        data=str(corpus),
        sequence_length=SEQUENCE_LENGTH,
        batch_size=BATCH_SIZE,
        steps=steps,
        lr=1.5e-3,
        eval_every=0,
        eval_windows=256,
        calibration_windows=32,
        save_every=max(1, steps // 6),
    )


def flops_per_token(index: int) -> float:
    """Training FLOPs per token of one of the demo's models."""
    return training_flops(model_config(index), SEQUENCE_LENGTH)


def engine(model: MoRModel) -> LLM:
    """An engine without prefix caching: equal prompts are computed each time, as they are timed."""
    return LLM(
        model,
        EngineConfig(kv_cache_memory_bytes=2**28, max_num_seqs=32, enable_prefix_caching=False),
    )


def generation_speeds(models: list[MoRModel], tokenizer: Tokenizer) -> list[float]:
    """Generated tokens per second of each model, 32 sequences at a time, measured in turns."""
    prompts = [tokenizer.encode(_PROMPT)] * 32
    params = SamplingParams(max_tokens=24, temperature=1.0, seed=1, ignore_eos=True)

    def job(llm: LLM) -> Callable[[], object]:
        return lambda: llm.generate(prompts, params)

    engines = [engine(model) for model in models]
    for llm in engines:
        job(llm)()  # compiles and allocates
    seconds = [[timed(job(llm)) for llm in engines] for _ in range(_ROUNDS)]
    num = len(prompts) * params.max_tokens
    return [num / statistics.median(column) for column in zip(*seconds, strict=True)]


def summarize(index: int, model: MoRModel, run: Path, steps: int, speed: float) -> RunSummary:
    """What the comparison shows of a finished run: its metrics and the cost model's numbers.

    Args:
        run: its folder.
        speed: generated tokens per second.
    """
    config = model.config
    rows = MetricsFile(run / "metrics.jsonl").rows()
    last = rows[-1]
    if "nll_topk" not in last:
        raise ConfigError(f"{run} has no final evaluation: remove it and run the demo again.")
    depth_fractions = depth_fractions_of(config, last["depth_histogram"])
    stepper = Stepper(config, BATCH_SIZE, SEQUENCE_LENGTH)
    states = 4 * 4 * num_parameters(config)  # weights, gradients, two moments, fp32
    return RunSummary(
        name=NAMES[index],
        parameters=num_parameters(config),
        parameters_non_embedding=num_parameters_non_embedding(config),
        flops_per_token=sequence_flops(config, SEQUENCE_LENGTH).mean,
        training_flops=flops_per_token(index) * steps * BATCH_SIZE * SEQUENCE_LENGTH,
        tokens=last["tokens"],
        seconds=sum(row["step_s"] for row in rows),
        memory_bytes=states + stepper.activation_bytes(),
        nll_topk=last["nll_topk"],
        nll_threshold=last["nll_threshold"],
        depth_histogram=tuple(last["depth_histogram"]),
        kv_bytes_per_token=kv_bytes_per_token(config, depth_fractions=depth_fractions),
        generated_per_s=speed,
        curve=tuple((row["tokens"], row["loss"]) for row in rows),
    )


def verdict(runs: list[RunSummary]) -> str:
    """A sentence that compares MoR with vanilla and with random routing, whoever is better."""
    mor, vanilla, random = runs

    def against(other: RunSummary) -> str:
        gap = other.nll_threshold - mor.nll_threshold
        return f"{abs(gap):.4f} nats {'below' if gap > 0 else 'above'} {other.name}"

    return (
        f"At equal training FLOPs MoR's causal validation NLL is {against(vanilla)}, with "
        f"{mor.parameters / vanilla.parameters:.0%} of its parameters and "
        f"{mor.kv_bytes_per_token / vanilla.kv_bytes_per_token:.0%} of its KV bytes per token; at "
        f"equal tokens and capacity it is {against(random)}."
    )
