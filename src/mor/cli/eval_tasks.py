"""`mor eval --tasks`: benchmarks through lm-evaluation-harness."""

import json
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mor.cli.options.config_options import flag
from mor.cli.options.engine_options import add_engine_options, engine_config
from mor.cli.options.model_options import open_model
from mor.cli.options.parser import Parser
from mor.engine.llm import LLM
from mor.errors import ConfigError, DataError, nearest
from mor.eval.harness import HFStyleTokenizer, evaluate
from mor.eval.local_tasks import TASKS, write_tasks
from mor.eval.scoring import EngineScorer, Scorer, TopkScorer
from mor.io.atomic_files import storage_error, write_file
from mor.io.checkpoint import resolve
from mor.io.tokenizer import Tokenizer
from mor.machine import machine
from mor.model.transformer import MoRModel
from mor.terminal.console import console, progress
from mor.terminal.table import print_table

_SELECTIONS = ("threshold", "topk")
_KV_MEMORY = 2**30  # bytes; prompts of tasks are short
_PACKAGES = ("mixture-of-recursions", "torch", "lm_eval", "datasets", "tokenizers")
_LOSS_ONLY = ("sequence_length", "max_windows", "calibrate", "by_token")
_TASKS_ONLY = (
    "limit",
    "num_fewshot",
    "prefix_token",
    "include_path",
    "output",
    "keep_tasks",
    "kv_cache_memory_bytes",
)


def add_options(p: Parser) -> None:
    """The options of `mor eval` that are about tasks."""
    group = p.add_argument_group("tasks of lm-evaluation-harness (extra eval)")
    group.add_argument(
        "--tasks",
        default=None,
        metavar="NAME,..",
        help=f"with --data DIR any of {', '.join(TASKS)}; else lm-eval's own, which it downloads",
    )
    group.add_argument("--limit", type=int | None, default=None, help="items of each; default: all")
    group.add_argument(
        "--num-fewshot", type=int | None, default=None, help="examples before each item"
    )
    group.add_argument(
        "--selection",
        default="threshold",
        help="threshold (default), on the engine; topk, which looks ahead, as the paper does",
    )
    group.add_argument(
        "--prefix-token",
        type=int | None,
        default=None,
        metavar="ID",
        help="before a text without context; default: <|endoftext|>, else BOS, else end of text",
    )
    group.add_argument(
        "--include-path", default=None, metavar="DIR", help="folder of more task files"
    )
    group.add_argument("--output", default=None, metavar="FILE", help="write the JSON there, too")
    group.add_argument(
        "--keep-tasks",
        default=None,
        metavar="DIR",
        help="leave the task files of --data there, for `lm_eval --include_path DIR`",
    )
    add_engine_options(
        group,
        ("kv_cache_memory_bytes",),
        helps={"kv_cache_memory_bytes": "bytes for keys and values; default 1 GiB"},
    )


def check_options(options: Any) -> None:
    """Refuse options of the other kind of evaluation.

    Raises:
        ConfigError: an option that would do nothing, or a value out of its range.
    """
    if options.selection not in _SELECTIONS:
        hint = nearest(options.selection, _SELECTIONS)
        raise ConfigError(f"--selection={options.selection} is unknown: {hint}")
    others = _TASKS_ONLY if options.tasks is None else _LOSS_ONLY
    given = [name for name in others if getattr(options, name) not in (None, 0)]
    if options.tasks is None and options.selection != "threshold":
        given.append("selection")
    if given:
        needs = "needs" if options.tasks is None else "does not go with"
        raise ConfigError(f"{flag(given[0])} {needs} --tasks.")
    for name, minimum in (("limit", 1), ("num_fewshot", 0)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{flag(name)}={value} must be at least {minimum}.")
    if options.tasks is not None and options.selection == "topk":
        given = [
            name
            for name in ("quantization", "dtype", "kv_cache_memory_bytes")
            if getattr(options, name)
        ]
        if given:
            raise ConfigError(
                f"{flag(given[0])} is the engine's: it does not go with --selection topk."
            )


def run(options: Any) -> int:
    """Evaluate and report; returns the exit status."""
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tasks names no task.")
    model, tokenizer = open_model(options.model, options.device)
    words = HFStyleTokenizer(tokenizer, model.config, options.prefix_token)
    scorer = _scorer(options, model, tokenizer)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mor-eval-") as temporary:
        include = [Path(options.include_path)] if options.include_path else []
        if include and not include[0].is_dir():
            raise DataError(f"--include-path={include[0]} is no folder.")
        if options.data is not None:
            folder = Path(options.keep_tasks or temporary)
            write_tasks([name for name in names if name in TASKS], Path(options.data), folder)
            include.append(folder)
        with progress() as bar:
            task = bar.add_task("requests", total=None)
            scores = evaluate(
                scorer,
                words,
                names,
                include=include,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    record = _record(options, words, scores, time.perf_counter() - began)
    text = json.dumps(record, indent=None if options.json else 2)
    if options.output is not None:
        try:
            write_file(Path(options.output), (text + "\n").encode())
        except OSError as error:
            raise storage_error(Path(options.output), error) from error
    if options.json:
        print(text)
    else:
        _print(options, scores)
    return 0


def _scorer(options: Any, model: MoRModel, tokenizer: Tokenizer) -> Scorer:
    if options.selection == "topk":
        return TopkScorer(model)
    memory = options.kv_cache_memory_bytes
    config = engine_config(
        options,
        max_num_seqs=128,
        chunked_prefill_size=512,
        kv_cache_memory_bytes=_KV_MEMORY if memory is None else memory,
    )
    return EngineScorer(LLM(model, config, tokenizer=tokenizer))


def _record(
    options: Any, words: HFStyleTokenizer, scores: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
    """The scores with all that is needed to repeat them: model, options, versions, machine."""
    return {
        "model": options.model,
        "checkpoint": str(resolve(options.model)),
        "selection": options.selection,
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
        "prefix_token": words.prefix_id,
        "data": options.data,
        "tasks": scores,
        "seconds": round(seconds, 3),
        "versions": {name: _version(name) for name in _PACKAGES},
        **machine(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _print(options: Any, scores: Mapping[str, Mapping[str, float | None]]) -> None:
    screen = console()
    rows = []
    for task, values in scores.items():
        for metric, value in values.items():
            name, bracket, rest = metric.partition("[")
            if value is None or name.endswith("_stderr"):
                continue
            error = values.get(f"{name}_stderr{bracket}{rest}")
            rows.append((task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"))
    print_table(screen, ("task", "metric", "value", "standard error"), rows)
    limit = f"the first {options.limit} items" if options.limit else "all items"
    screen.print(f"{options.model}, selection {options.selection}, {limit} of each", markup=False)
