"""`mor bench eval`: `mor eval --tasks` against `lm_eval --model hf`, the same items."""

import json
from collections.abc import Sequence
from pathlib import Path

from mor.bench.harness import measure
from mor.cli.options.config_options import flag
from mor.cli.options.parser import parser
from mor.errors import ConfigError
from mor.machine import machine
from mor.terminal.console import console
from mor.terminal.table import print_table

HELP = "Wall time and scores of our tasks against lm-eval's own hf model."

EXAMPLES = (
    "mor convert to-hf models/smollm2 --out exported/smollm2",
    "mor bench eval models/smollm2 --exported exported/smollm2 --data data/eval",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser("bench eval", HELP, EXAMPLES)
    p.add_argument("model", metavar="MODEL", help="folder of a checkpoint or of a run")
    p.add_argument("--exported", required=True, metavar="DIR", help="the same for transformers")
    p.add_argument("--data", required=True, metavar="DIR", help="folder of the evaluation sets")
    p.add_argument("--blimp", type=int, default=200, help="pairs")
    p.add_argument("--hellaswag", type=int, default=100, help="items")
    p.add_argument("--batch-size", type=int, default=1, help="of hf; 1 is lm-eval's default")
    p.add_argument("--rounds", type=int, default=3, help="timed rounds, in turns")
    p.add_argument("--json", action="store_true", help="one JSON line instead of a table")
    options = p.parse_args(list(args))
    for name in ("blimp", "hellaswag", "batch_size", "rounds"):
        value = getattr(options, name)
        if value < 1:
            raise ConfigError(f"{flag(name)}={value} must be at least 1.")
    items = {"blimp": options.blimp, "hellaswag": options.hellaswag}
    found = measure(
        options.model,
        options.exported,
        Path(options.data),
        items,
        options.batch_size,
        options.rounds,
    )
    record = {"bench": "eval", "machine": machine(), **found}
    if options.json:
        print(json.dumps(record))
        return 0
    rows = [
        (
            f"{task} {metric}",
            *(f"{found['scores'][side][task][metric]:.4f}" for side in ("mor", "hf")),
        )
        for task, metric in (("blimp", "acc"), ("hellaswag", "acc"), ("hellaswag", "acc_norm"))
    ]
    print_table(console(), ("", "mor", "hf"), rows)
    console().print(f"hf takes {found['ratio']:.2f} times as long.")
    console().print(json.dumps(record), soft_wrap=True)
    return 0
