"""`mor train`: pre-train a model, or continue."""

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin

from mor.cli.options.config_options import field_help
from mor.cli.options.overrides import model_fields, yaml_value
from mor.cli.options.parser import parser
from mor.errors import ConfigError
from mor.io.checkpoint import load_config, resolve
from mor.io.model_card import model_card, write_card
from mor.terminal.console import console
from mor.terminal.training_progress import watched
from mor.train.config import TrainConfig
from mor.train.distributed import is_rank0
from mor.train.trainer import Trainer
from mor.validation import base_type, check_keys
from mor.yaml_config import merge, read_yaml

HELP = "Pre-train a model, or continue."

EXAMPLES = (
    "mor train configs/smoke.yaml --out runs/smoke",
    "mor train configs/smoke.yaml --out runs/smoke --resume auto",
    "mor train configs/360m-mor3.yaml --data data/web --micro_batch_size 16 --precision bf16",
    "mor train configs/smoke.yaml --out runs/r4 --model.num_recursions 4 --lr 1e-3",
    "mor train configs/smoke.yaml --out runs/short --budget '1e13 flops'",
    "torchrun --nproc-per-node 8 --no-python mor train configs/360m-mor3.yaml --parallel fsdp",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options, overrides = _split(args)
    config = load_train_config(options.config, overrides)
    out = Path(options.out or Path("runs") / Path(options.config).stem)
    screen = console()
    screen.quiet = not is_rank0()
    with watched(screen, config) as (on_step, should_stop):
        trainer = Trainer(
            config, out, resume=options.resume, on_step=on_step, should_stop=should_stop
        )
        if trainer.finished:
            screen.print(f"{out} is finished: {trainer.step} of {trainer.step} steps.")
            trainer.world.leave()
            return 0
        if trainer.step:
            screen.print(f"resuming {out} after step {trainer.step}.")
        outcome = trainer.run()
        trainer.world.leave()
    if outcome == "stopped":
        screen.print(
            f"stopped and saved after step {trainer.step} of {trainer.total_steps:.0f}; continue "
            f"with `mor train {options.config} --out {out} --resume auto`."
        )
        return 0
    if is_rank0():
        _write_card(out, args)
    screen.print(f"finished: {out}. Next: `mor generate {out} --show-depth`, `mor eval {out}`.")
    return 0


def _write_card(out: Path, args: Sequence[str]) -> None:
    """The model card of a finished run, beside its newest checkpoint."""
    last = json.loads((out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    known = {
        "step": "steps",
        "tokens": "tokens seen",
        "nll_topk": "validation NLL, topk",
        "nll_threshold": "validation NLL, threshold",
        "router_accuracy": "router accuracy",
        "dead_share": "dead share",
    }
    folder = resolve(out)
    text = model_card(
        load_config(folder),
        name=out.name,
        commands=(f"mor train {shlex.join(args)}",),
        numbers={text: last[key] for key, text in known.items() if last.get(key) is not None},
        depth_shares=last.get("depth_histogram", ()),
    )
    write_card(folder, text)


def _split(args: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Own options, and the training config's overrides as nested plain data."""
    p = parser("train", HELP, EXAMPLES)
    p.add_argument("config", help="YAML file with fields of the training config")
    p.add_argument("--out", default=None, help="folder of the run; default runs/<config's name>")
    p.add_argument(
        "--resume",
        default="never",
        help="never, auto (newest checkpoint in --out, if any), or a checkpoint's folder",
    )
    group = p.add_argument_group("training config, the same keys as in the YAML file")
    for f in fields(TrainConfig):
        if f.name != "model":
            text = f"{field_help(f, TrainConfig)} (default: {f.default})"
            group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, metavar="VALUE", help=text)
    group.add_argument("--model.FIELD", default=None, metavar="VALUE", help="a field of the model")
    own, model = model_fields(args)
    overrides: dict[str, Any] = {"model": model} if model else {}
    options = p.parse_args([_with_underscores(arg) for arg in own])
    for f in fields(TrainConfig):
        given = getattr(options, f.name, None)
        if f.name != "model" and given is not None:
            overrides[f.name] = yaml_value(given)
    return options, overrides


def _with_underscores(arg: str) -> str:
    """`--batch-size` as `--batch_size`, for those who are used to the other verbs."""
    name, equals, value = arg.partition("=")
    spelled = name.removeprefix("--").replace("-", "_")
    known = name.startswith("--") and spelled in {f.name for f in fields(TrainConfig)}
    return f"--{spelled}{equals}{value}" if known else arg


def load_train_config(path: str | Path, overrides: dict[str, Any] | None = None) -> TrainConfig:
    """A training config from a YAML file, with overrides.

    Raises:
        ConfigError: an unknown key (the message names the nearest), a value of the wrong type, or
            a combination that cannot work.
    """
    values = merge(read_yaml(Path(path)), overrides or {})
    check_keys(values, TrainConfig, f"{path}: field", ConfigError)
    known = {f.name: f for f in fields(TrainConfig)}
    for key, value in values.items():
        values[key] = _typed(value, base_type(known[key].type))
    return TrainConfig.from_dict(values)


def _typed(value: Any, kind: Any) -> Any:
    """The value as its field wants it: `1e-3` as a number, 2e4 as an integer, text as a path.

    What is still of the wrong type is refused by the config itself.
    """
    if get_origin(kind) is dict and isinstance(value, dict):  # the fields of the model
        return {k: yaml_value(v) if isinstance(v, str) else v for k, v in value.items()}
    if kind is Path:
        return None if value is None else Path(str(value))
    if kind in (int, float, bool) and isinstance(value, str):
        value = yaml_value(value)
    whole = isinstance(value, float) and value.is_integer()
    return int(value) if kind is int and whole else value
