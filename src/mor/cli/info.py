"""`mor info`: parameters, FLOPs and KV bytes of a model, next to its vanilla twin."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mor.cli.options.parser import parser
from mor.cli.train import load_train_config
from mor.errors import ConfigError
from mor.io.checkpoint import load_config, newest_step
from mor.model import cost
from mor.model.config import MoRConfig
from mor.terminal.console import console
from mor.terminal.table import print_table

HELP = "Parameters, FLOPs per token by depth and KV bytes, next to the vanilla twin."

EXAMPLES = (
    "mor info configs/360m-mor3.yaml",
    "mor info 360m --num-recursions 4 --context 1024",
    "mor info runs/smoke --json",
)

_UNITS: Mapping[str, float] = MappingProxyType({"T": 1e12, "G": 1e9, "M": 1e6, "K": 1e3})


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    p = parser("info", HELP, EXAMPLES)
    p.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="folder of a checkpoint or a run, a training YAML, or a preset such as 360m",
    )
    p.add_argument("--num-recursions", type=int | None, default=None, help="of a preset; default 3")
    p.add_argument(
        "--context",
        type=int | None,
        default=None,
        metavar="N",
        help="sequence length of the FLOPs; default: max_position_embeddings",
    )
    p.add_argument("--json", action="store_true", help="one JSON object")
    options = p.parse_args(args)
    config = find_config(options.model, options.num_recursions)
    limit = config.max_position_embeddings
    context = limit if options.context is None else options.context
    if not 1 <= context <= limit:
        raise ConfigError(
            f"--context={context} does not fit this model: it takes 1 to "
            f"max_position_embeddings={limit} tokens."
        )
    ours, twin = costs(config, context), costs(config.vanilla_twin(), context)
    if options.json:
        print(json.dumps({**ours, "vanilla": twin}))
        return 0
    screen = console()
    screen.print(f"{options.model}: {_kind(config)}", markup=False)
    print_table(screen, ("", "this", "vanilla", "ratio"), _rows(config, ours, twin))
    shares = ", ".join(f"{share:.2f}" for share in ours["depth_capacities"])
    screen.print(f"share of tokens at each depth: {shares}")
    return 0


def find_config(name: str, num_recursions: int | None = None) -> MoRConfig:
    """The config of a YAML file, of a checkpoint's or a run's folder, or of a preset.

    Raises:
        ConfigError: nothing of this name, or its settings cannot work.
        CheckpointError: the folder holds no model.
    """
    path = Path(name)
    if not path.exists() and path.suffix not in (".yaml", ".yml") and path.name == name:
        recursions = 3 if num_recursions is None else num_recursions
        if recursions < 1:
            raise ConfigError(f"--num-recursions={recursions} must be at least 1.")
        try:
            return MoRConfig.preset(name, recursions)
        except ConfigError as error:
            raise ConfigError(f"{name!r} is no file or folder here, and {error}") from error
    if num_recursions is not None:
        raise ConfigError(
            f"--num-recursions={num_recursions} goes with a preset such as 360m; {name} says "
            "itself how many it has."
        )
    if path.is_dir():
        yaml = path / "config.yaml"
        untrained = newest_step(path) is None and not (path / "config.json").is_file()
        return _from_yaml(yaml) if untrained and yaml.is_file() else load_config(path)
    return _from_yaml(path)


def _from_yaml(path: Path) -> MoRConfig:
    train = load_train_config(path)
    if train.init_from is None:
        return train.model_config()
    start = load_config(train.init_from)
    if not train.model:
        return start
    return replace(train, model={"vocab_size": start.vocab_size, **train.model}).model_config()


def costs(config: MoRConfig, context: int) -> dict[str, Any]:
    """Parameters, FLOPs and KV bytes of a model at a sequence length, as plain data.

    FLOPs are those of the forward pass, averaged over the sequence.
    """
    flops = cost.sequence_flops(config, context)
    depths = range(1, config.num_recursions + 1)
    return {
        "parameters": cost.num_parameters(config),
        "parameters_non_embedding": cost.num_parameters_non_embedding(config),
        "flops_per_token": round(flops.mean, 3),
        "flops_per_token_by_depth": [round(flops.for_recursions(count), 3) for count in depths],
        "training_flops_per_token": round(cost.training_flops(config, context), 3),
        "kv_bytes_per_token": round(cost.kv_bytes_per_token(config), 3),
        "num_hidden_layers": config.num_hidden_layers,
        "depth_capacities": list(config.depth_capacities),
        "context": context,
    }


def _kind(config: MoRConfig) -> str:
    """Routing, layers, width and cache policy of a model, in words."""
    if config.num_recursions == 1:
        return f"vanilla, {config.num_hidden_layers} layers, {config.hidden_size} wide"
    routing = {
        "none": "recursive, no routing",
        "expert_choice": "Mixture-of-Recursions, expert choice",
        "token_choice": "Mixture-of-Recursions, token choice",
    }[config.routing]
    relaxed = f", LoRA pairs of rank {config.relaxation_rank}" if config.relaxation_rank else ""
    layers = f"{config.num_prelude_layers} + {config.num_block_layers} + {config.num_coda_layers}"
    return (
        f"{routing}, {layers} layers, {config.hidden_size} wide, block up to "
        f"{config.num_recursions} times, {config.kv_strategy} KV{relaxed}"
    )


def _rows(
    config: MoRConfig, ours: dict[str, Any], twin: dict[str, Any]
) -> list[tuple[str, str, str, str]]:
    def row(name: str, key: str) -> tuple[str, str, str, str]:
        return name, _short(ours[key]), _short(twin[key]), f"{ours[key] / twin[key]:.3f}"

    rows = [
        row("parameters", "parameters"),
        row("parameters without embedding", "parameters_non_embedding"),
        row("effective layers", "num_hidden_layers"),
        row(f"FLOPs per token, {ours['context']:,} tokens", "flops_per_token"),
    ]
    full = twin["flops_per_token"]
    if config.num_recursions > 1:
        rows += [
            (
                f"  of a token at {count} of {config.num_recursions}",
                _short(f),
                "",
                f"{f / full:.3f}",
            )
            for count, f in enumerate(ours["flops_per_token_by_depth"], start=1)
        ]
    return [
        *rows,
        row("training FLOPs per token", "training_flops_per_token"),
        row("KV bytes per token, bf16", "kv_bytes_per_token"),
    ]


def _short(value: float) -> str:
    """A number with four digits and a unit, such as 118.4M."""
    for unit, size in _UNITS.items():
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"
