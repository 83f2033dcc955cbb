"""`mor bench`: measure against baselines in the same run."""

import json
from collections.abc import Sequence

from mor.bench.timing import gemm_gflops, machine
from mor.bench.train import Comparison, compare, comparisons
from mor.cli.table import print_table
from mor.cli.terminal import console, err_console, parser
from mor.errors import ConfigError, nearest

EXAMPLES = (
    "mor bench train",
    "mor bench train --json --rounds 9 --only dropping",
)
_WHAT = ("train",)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser("bench", "Measure against baselines, paired and alternating, in one run.", EXAMPLES)
    names = [c.name for c in comparisons()]
    p.add_argument("what", help=f"one of: {', '.join(_WHAT)}")
    p.add_argument("--rounds", type=int, default=7, help="timed rounds, A B A B (default 7)")
    p.add_argument("--only", default=None, help=f"one comparison: {', '.join(names)}")
    p.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    options = p.parse_args(list(args))
    if options.what not in _WHAT:
        raise ConfigError(f"bench {options.what!r} is unknown: {nearest(options.what, _WHAT)}")
    if options.only is not None and options.only not in names:
        raise ConfigError(f"--only {options.only!r} is unknown: {nearest(options.only, names)}")
    if options.rounds < 1:
        raise ConfigError(f"--rounds {options.rounds} must be at least 1.")
    chosen = [c for c in comparisons() if options.only in (None, c.name)]
    return _train(chosen, options.rounds, options.json)


def _train(chosen: Sequence[Comparison], rounds: int, as_json: bool) -> int:
    results = []
    for comparison in chosen:
        err_console().print(f"measuring {comparison.name} ...")
        results.append(compare(comparison, rounds=rounds))
    record = {
        "bench": "train",
        "machine": machine(),
        "gemm_gflops": gemm_gflops(),
        "comparisons": {result["name"]: result for result in results},
    }
    if as_json:
        print(json.dumps(record))
        return 0
    columns = ("", "time ratio", "FLOP ratio", "time / FLOPs", "bar", "memory ratio", "bar")
    rows = []
    for comparison, result in zip(chosen, results, strict=True):
        bar = comparison.memory_bar
        rows.append(
            (
                comparison.name,
                f"{result['time']['ratio']:.3f}",
                f"{result['flops_ratio']:.3f}",
                f"{result['time_over_flops']:.3f}",
                f"{comparison.time_bar:.2f}",
                f"{result['activation_ratio']:.3f}",
                "" if bar is None else f"{bar * result['flops_ratio']:.3f}",
            )
        )
    print_table(console(), columns, rows)
    console().print(json.dumps(record), soft_wrap=True)
    return 0
