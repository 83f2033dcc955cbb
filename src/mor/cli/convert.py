"""`mor convert`: checkpoints of other programs in, ours out."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mor.cli.options.config_options import add_field_options
from mor.cli.options.overrides import model_fields
from mor.cli.options.parser import Parser, parser
from mor.errors import ConfigError, nearest
from mor.io.hf_export import export
from mor.io.llama import convert_llama
from mor.io.model_card import model_card, write_card
from mor.io.reference_checkpoint import convert_official
from mor.model import cost
from mor.model.config import MoRConfig
from mor.model.transformer import MoRModel
from mor.terminal.console import console, fail

HELP = "Turn checkpoints of other programs into ours, and ours into theirs."

EXAMPLES = (
    "mor convert from-llama SmolLM2-135M --out models/smollm2",
    "mor convert from-llama SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2",
    "mor convert from-llama models/tinyllama --out models/mor3 --num-recursions 3 --init average",
    "mor convert from-llama models/llama --out models/r2 --num-recursions 2 --relaxation-rank 64",
    "mor convert from-official checkpoints/mor3 --out models/mor3 --config conf/mor3.yaml",
    "mor convert to-hf runs/mor3 --out exported/mor3 --dtype bfloat16",
)

SUBVERBS: Mapping[str, str] = MappingProxyType(
    {
        "from-llama": "a Llama, SmolLM or TinyLlama as vanilla, recursive or MoR model",
        "from-official": "a checkpoint of the paper's own code, with its YAML",
        "to-hf": "ours as a folder that transformers loads where mor is not installed",
    }
)

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)
_SHARINGS = ("middle_cycle", "middle_sequence", "cycle", "sequence")
_INITS = ("stepwise", "average", "lower", "upper", "random")
_FIELDS = (  # of MoRConfig, with an option of their own
    "routing",
    "kv_strategy",
    "relaxation_rank",
    "num_block_layers",
    "num_prelude_layers",
    "num_coda_layers",
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if args[0] not in SUBVERBS:
        known = nearest(args[0], SUBVERBS)
        message = f"unknown verb 'convert {args[0]}': {known}\n  `mor convert --help` tells more."
        return fail(message, 2)
    verbs = {"from-llama": _from_llama, "from-official": _from_official, "to-hf": _to_hf}
    return verbs[args[0]](args[1:])


def _usage() -> str:
    rows = "\n".join(f"  {verb:<16}{what}" for verb, what in SUBVERBS.items())
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        f"usage: mor convert VERB ...\n\n{HELP}\n\nverbs:\n{rows}\n\nexamples:\n{examples}\n\n"
        "`mor convert VERB --help` tells more.\n"
    )


def _from_llama(args: Sequence[str]) -> int:
    p = parser(
        "convert from-llama",
        "A Llama's checkpoint as a vanilla or a recursive model.",
        EXAMPLES[:4],
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="folder with config.json and safetensors or pytorch_model.bin, whole or in shards; or "
        "a .gguf file (extra gguf)",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    p.add_argument(
        "--num-recursions", type=int, default=1, help="1: vanilla, the same function as the Llama"
    )
    _add_recursive(p)
    p.add_argument("--seed", type=int, default=0, help="of the routers, and of --init random")
    p.add_argument("--dtype", default=None, help="float32, bfloat16, float16; default: the file's")
    p.add_argument("--model.FIELD", default=None, metavar="VALUE", help="any field of the model")
    own, fields = model_fields(args)
    options = p.parse_args(own)
    dtype = _dtype(options.dtype)
    given = {name: getattr(options, name) for name in _FIELDS if getattr(options, name) is not None}
    model = convert_llama(
        options.source,
        options.out,
        num_recursions=options.num_recursions,
        init=_chosen("init", options, _INITS),
        sharing=_chosen("sharing", options, _SHARINGS),
        seed=options.seed,
        dtype=dtype,
        **given,
        **fields,
    )
    recursive = ("mor train CONFIG --init_from {out}",) if options.num_recursions > 1 else ()
    _card(options, model, f"mor convert from-llama {shlex.join(args)}")
    _report(options.out, model, *recursive)
    return 0


def _from_official(args: Sequence[str]) -> int:
    p = parser("convert from-official", "A checkpoint of the paper's own code.", EXAMPLES[4:5])
    p.add_argument("source", metavar="DIR", help="folder with its weights")
    p.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    p.add_argument("--config", default=None, help="its YAML; default: the only one in DIR")
    p.add_argument(
        "--llama-config", default=None, metavar="FILE", help="default: config.json in DIR"
    )
    p.add_argument("--tokenizer", default=None, metavar="PATH", help="default: the one in DIR")
    options = p.parse_args(args)
    model = convert_official(
        options.source,
        options.out,
        config=options.config,
        llama_config=options.llama_config,
        tokenizer=options.tokenizer,
    )
    _card(options, model, f"mor convert from-official {shlex.join(args)}")
    _report(options.out, model)
    return 0


def _to_hf(args: Sequence[str]) -> int:
    p = parser("convert to-hf", "A model as a folder for transformers.", EXAMPLES[5:])
    p.add_argument("source", metavar="MODEL", help="checkpoint or run (its newest checkpoint)")
    p.add_argument("--out", required=True, metavar="DIR", help="new folder to write")
    p.add_argument("--dtype", default=None, help="float32, bfloat16, float16; default: the file's")
    options = p.parse_args(args)
    export(options.source, options.out, dtype=_dtype(options.dtype))
    call = f"AutoModelForCausalLM.from_pretrained({options.out!r}, trust_remote_code=True)"
    console().print(f"{options.out}: `{call}` needs no mor.", markup=False)
    return 0


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in _DTYPES:
        raise ConfigError(f"--dtype={name} is unknown: {nearest(name, _DTYPES)}")
    return _DTYPES[name] if name else None


def _add_recursive(p: Parser) -> None:
    """Options that only a recursive model has."""
    p.add_argument(
        "--sharing",
        default=None,
        help="middle_cycle (default), middle_sequence: with an unshared layer at each end; cycle, "
        "sequence: without",
    )
    p.add_argument(
        "--init",
        default=None,
        help="layers that the block starts from: stepwise (default), average, lower, upper, random",
    )
    add_field_options(
        p,
        MoRConfig,
        _FIELDS,
        defaults=dict.fromkeys(_FIELDS),  # None leaves a field to the conversion
        helps={
            "routing": "expert_choice (default), token_choice, none: recursive",
            "kv_strategy": "recursion_wise (default) or shared",
            "relaxation_rank": "rank of the LoRA pair that each depth adds to each matrix of the "
            "block; it starts from the singular value decomposition of what sharing lost; "
            "default: no pairs",
        },
    )


def _chosen(name: str, options: Any, choices: tuple[str, ...]) -> Any:
    """An option's value; without one the first of its choices."""
    value = getattr(options, name)
    if value is None:
        return choices[0]
    if value not in choices:
        raise ConfigError(f"--{name}={value} is unknown: {nearest(value, choices)}")
    if options.num_recursions == 1:
        raise ConfigError(
            f"--{name}={value} needs --num-recursions of 2 or more: a vanilla model has no block "
            "that is shared."
        )
    return value


def _card(options: Any, model: MoRModel, command: str) -> None:
    """Write the model card of a converted model."""
    trained = model.config.num_recursions == 1 or "official" in command.split()[2]
    state = "the same function" if trained else "its layers, and not trained since"
    origin = f"Converted from `{Path(options.source).name}`: {state}."
    name = Path(options.out).name
    folder = Path(options.out)
    write_card(folder, model_card(model.config, name=name, commands=(command,), origin=origin))


def _report(
    out: str, model: MoRModel, ready: str = "mor generate {out} --prompt 'Once upon a time'"
) -> None:
    config, screen = model.config, console()
    kind = "vanilla" if config.num_recursions == 1 else f"recursive, routing {config.routing}"
    screen.print(
        f"{out}: {kind}, {cost.num_parameters(config):,} parameters, {config.num_hidden_layers} "
        f"effective layers, {str(model.embed_tokens.weight.dtype).removeprefix('torch.')}",
        markup=False,
    )
    if not (Path(out) / "tokenizer.json").is_file():
        screen.print("no tokenizer.json came along: prompts must be token ids.")
    screen.print(f"next: `{ready.format(out=out)}`", markup=False)
