"""`mor bench`: measure against baselines in the same run."""

import json
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mor.bench.data_loading import measure as measure_reading
from mor.bench.timing import gemm_gflops
from mor.bench.train_ab import compare, comparisons
from mor.cli.options.engine_options import add_engine_options, engine_settings
from mor.cli.options.parser import Parser, parser
from mor.errors import ConfigError, nearest
from mor.machine import machine
from mor.terminal.console import console, err_console
from mor.terminal.table import print_table

EXAMPLES = (
    "mor bench train --rounds 5 --models mor2 token3 --threads 2",
    "mor bench train --json --rounds 9 --only dropping",
    "mor bench throughput --max-num-seqs 64 --prompt 128 --output 128",
    "mor bench throughput --max-num-seqs 16 --prompt 1536 --output 512 --decode-only --models mor4",
    "mor bench throughput --against transformers --max-num-seqs 1 32 --output 64",
    "mor bench latency --models mor3",
    "mor bench ops --json",
    "mor bench eval models/smollm2 --exported exported/smollm2 --data data/eval",
    "mor bench serve --port 8000 --num-prompts 64 --max-concurrency 32  # its options: --help",
)
HELP = "Measure against baselines, paired and alternating, in one run."


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    if args and args[0] == "serve":
        from mor.cli.bench import serve as bench_serve

        return bench_serve.run(args[1:])
    if args and args[0] == "eval":
        from mor.cli.bench import eval as bench_eval

        return bench_eval.run(args[1:])
    p = parser("bench", HELP, EXAMPLES)
    p.add_argument("what", help=f"one of: {', '.join((*_WHAT, 'serve', 'eval'))}")
    p.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    p.add_argument("--rounds", type=int, default=None, help="timed rounds, A B A B")
    _add_workload_options(p)
    add_engine_options(p, ("dtype", "quantization", "num_scheduler_steps"))
    p.add_argument(
        "--only", default=None, help=f"train: one of {', '.join(c.name for c in comparisons())}"
    )
    p.add_argument("--batch", type=int, default=2, help="train: sequences")
    p.add_argument("--length", type=int, default=512, help="train: tokens of a sequence")
    p.add_argument("--threads", type=int, default=None, help="train: of torch; default all cores")
    p.add_argument("--compile", action="store_true", help="train: with torch.compile")
    p.add_argument("--checkpointing", default="none", help="train: none, recursion or full")
    options = p.parse_args(list(args))
    if options.what not in _WHAT:
        hint = nearest(options.what, (*_WHAT, "serve", "eval"))
        raise ConfigError(f"bench {options.what!r} is unknown: {hint}")
    if options.rounds is not None and options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds} must be at least 1.")
    result, rows = _WHAT[options.what](options)
    record = {"bench": options.what, "machine": machine(), "gemm_gflops": gemm_gflops(), **result}
    if options.json:
        print(json.dumps(record))
        return 0
    for header, lines in rows:
        print_table(console(), header, lines)
    console().print(json.dumps(record), soft_wrap=True)
    return 0


Tables = Sequence[tuple[Sequence[str], Sequence[Sequence[str]]]]


def _add_workload_options(p: Parser) -> None:
    """The options that are fields of `ThroughputConfig`, and how to measure it."""
    p.add_argument("--preset", default="135m", help="shape of the models: 135m, 360m, 730m, 1.7b")
    p.add_argument(
        "--models", nargs="+", default=None, help="beside vanilla: mor2 ..; train: token3 .., too"
    )
    p.add_argument("--max-num-seqs", type=int, nargs="+", default=[64], help="in flight")
    p.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    p.add_argument("--output", type=int, default=128, help="tokens generated for each")
    p.add_argument("--seconds", type=float, default=6.0, help="of each engine in a round")
    p.add_argument(
        "--decode-only", action="store_true", help="start the clock when all prompts have entered"
    )
    p.add_argument(
        "--equal-memory",
        action="store_true",
        help="as many sequences as fit into the memory of the vanilla ones; decode only",
    )
    p.add_argument("--against", default=None, help="transformers, or float32 for int8 weights")


def _train(options: Any) -> tuple[dict[str, Any], Tables]:
    if options.only is None:
        return _steps(options)
    names = [c.name for c in comparisons()]
    if options.only is not None and options.only not in names:
        raise ConfigError(f"--only {options.only!r} is unknown: {nearest(options.only, names)}")
    chosen = [c for c in comparisons() if options.only in (None, c.name)]
    results: list[dict[str, Any]] = []
    for comparison in chosen:
        err_console().print(f"measuring {comparison.name} ...")
        results.append(compare(comparison, rounds=options.rounds or 7))
        results[-1] |= {"reading": measure_reading(comparison, rounds=3)}
    columns = ("", "time ratio", "FLOP ratio", "time / FLOPs", "bar", "memory ratio", "bar")
    rows = [
        (
            comparison.name,
            f"{result['time']['ratio']:.3f}",
            f"{result['flops_ratio']:.3f}",
            f"{result['time_over_flops']:.3f}",
            f"{comparison.time_bar:.2f}",
            f"{result['activation_ratio']:.3f}",
            ""
            if comparison.memory_bar is None
            else f"{comparison.memory_bar * result['flops_ratio']:.3f}",
        )
        for comparison, result in zip(chosen, results, strict=True)
    ]
    header = ("reading shards", "step", "of a corpus", "of a mixture", "bar")
    reading = [
        (
            result["name"],
            f"{result['reading']['step_s'] * 1e3:,.0f} ms",
            *(f"{share:.3%}" for share in result["reading"]["data_share"].values()),
            f"{result['reading']['data_bar']:.0%}",
        )
        for result in results
    ]
    record = {"comparisons": {r["name"]: r for r in results}}
    return record, [(columns, rows), (header, reading)]


def _steps(options: Any) -> tuple[dict[str, Any], Tables]:
    import torch

    from mor.bench import train_step as steps

    for name in ("batch", "length", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)} must be at least 1.")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    plan = steps.TrainStepConfig(
        preset=options.preset,
        models=tuple(options.models or steps.TrainStepConfig.models),
        rounds=options.rounds or steps.TrainStepConfig.rounds,
        batch_size=options.batch,
        length=options.length,
        compile=options.compile,
        activation_checkpointing=options.checkpointing,
    )
    _note(f"{', '.join(plan.models)} against vanilla")
    record = steps.measure(plan)
    return record, steps.tables(record)


def _throughput_config(options: Any, max_num_seqs: int) -> Any:
    """The `ThroughputConfig` of the options, which may give several numbers of sequences."""
    from mor.bench.throughput import ThroughputConfig

    return ThroughputConfig(
        preset=options.preset,
        models=tuple(options.models or ThroughputConfig.models),
        prompt=options.prompt,
        output=options.output,
        decode_only=options.decode_only or options.equal_memory,
        rounds=options.rounds or 5,
        seconds=options.seconds,
        **engine_settings(options) | {"max_num_seqs": max_num_seqs},  # one of those that are given
    )


def _note(text: str) -> None:
    err_console().print(f"measuring {text} ...")


def _throughput(options: Any) -> tuple[dict[str, Any], Tables]:
    from mor.bench import baselines, throughput

    if options.against not in (None, "transformers", "float32"):
        hint = nearest(options.against, ("transformers", "float32"))
        raise ConfigError(f"--against {options.against!r} is unknown: {hint}")
    plans = [_throughput_config(options, count) for count in options.max_num_seqs]
    if options.against == "transformers":
        found = [
            baselines.against_transformers(p, p.max_num_seqs, options.output, _note) for p in plans
        ]
        return {"against": "transformers", "results": found}, [_ratio_table("sequences", found)]
    if options.against == "float32":
        found = [
            {"model": r, "sequences": p.max_num_seqs, **baselines.quantized(p, r, p.max_num_seqs)}
            for p in plans
            for r in (1, *p.recursions)
        ]
        return {"against": "float32", "results": found}, [_ratio_table("model", found)]
    if options.equal_memory:
        found = [{"model": r, **throughput.equal_memory(p, r)} for p in plans for r in p.recursions]
        return {"equal_memory": found}, [_ratio_table("model", found)]
    (plan,) = plans[:1]
    record = throughput.measure(plan, _note)
    columns = ("", "tokens/s", "x vanilla", "bound", "of bound", "x sequence-wise", "GEMM share")
    columns += ("overhead",)
    rows = [
        (
            name,
            f"{rate:.1f}",
            *(
                f"{record[key][name]:.3f}" if name in record[key] else ""
                for key in ("ratio", "bound", "fraction_of_bound", "depth_over_sequence")
            ),
            *(_share(record[key][name]) for key in ("gemm_share", "overhead_share")),
        )
        for name, rate in record["tokens_per_s"].items()
    ]
    return record, [(columns, rows)]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _ratio_table(key: str, found: list[dict[str, Any]]) -> Any:
    rows = [
        (str(f[key]), f"{f['ratio']:.3f}", f"{f['ratio_min']:.3f} .. {f['ratio_max']:.3f}")
        for f in found
    ]
    return (key, "ratio", "rounds"), rows


def _latency(options: Any) -> tuple[dict[str, Any], Tables]:
    from mor.bench import latency

    record = latency.measure(_throughput_config(options, 1), _note)
    columns = ("", "time ratio", "FLOP ratio", "time / FLOPs", "tokens/s", "vanilla")
    rows = [
        (
            name,
            f"{r['time']['ratio']:.3f}",
            f"{r['flops_ratio']:.3f}",
            f"{r['time_over_flops']:.3f}",
            *(f"{rate:.0f}" for rate in r["tokens_per_s"]),
        )
        for name, r in record.items()
    ]
    return {"latency": record}, [(columns, rows)]


def _ops(options: Any) -> tuple[dict[str, Any], Tables]:
    from mor.bench import ops

    record = ops.measure(options.preset, _note)
    products = record["products_gflops"]
    names = [name for name in products if name != "rows"]
    rows = [
        (str(rows), *(f"{products[name][i]:.0f}" for name in names))
        for i, rows in enumerate(products["rows"])
    ]
    attention = [
        (
            name,
            f"{a['ms']:.2f}",
            f"{a['gather_and_sdpa_ms']:.2f}",
            f"{a['gb_per_s']:.1f}",
            f"{a['read_gb_per_s']:.1f}",
            f"{a['share_of_bandwidth']:.1%}",
        )
        for name, a in record["attention"].items()
    ]
    header = ("attention", "ms", "gather + SDPA", "GB/s", "plain read", "share")
    return record, [(("rows", *names), rows), (header, attention)]


_WHAT: Mapping[str, Callable[[Any], tuple[dict[str, Any], Tables]]] = MappingProxyType(
    {"train": _train, "throughput": _throughput, "latency": _latency, "ops": _ops}
)
