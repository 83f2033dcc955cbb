"""The model card, `README.md` beside a model's weights, in the form that model hubs read.

`mor convert` and the end of `mor train` write it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from mor.errors import CheckpointError
from mor.io.atomic_files import storage_error, write_file
from mor.model import cost
from mor.model.config import MoRConfig

CARD = "README.md"
_BAR = 40  # characters of a full bar


def model_card(
    config: MoRConfig,
    *,
    name: str,
    commands: Sequence[str] = (),
    origin: str | None = None,
    base_model: str | None = None,
    numbers: Mapping[str, float | int | str] | None = None,
    depth_shares: Sequence[float] = (),
    library: str = "mor",
    use: Sequence[str] | None = None,
) -> str:
    """Text of a model card: what the model is, its shape, the commands and numbers given here.

    Args:
        name: heading.
        commands: lines that made the model.
        origin: a sentence on where the weights come from.
        base_model: hub repository of the model that it was made from.
        numbers: results of an evaluation by name.
        depth_shares: (R + 1,) share of the tokens with 0, 1, .. R recursions.
        library: the hub's name of the library that loads the model.
        use: lines of the section "Use"; None: those for `mor`.
    """
    meta = [
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        "tags:",
        "- mixture-of-recursions",
    ]
    if base_model is not None:
        meta.append(f"base_model: {base_model}")
    parts = ["---", *meta, "---", "", f"# {name}", "", _what(config)]
    if origin is not None:
        parts += ["", origin]
    parts += ["", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in _shape(config).items())]
    if commands:
        parts += ["", "## Commands", "", "```sh", *commands, "```"]
    if numbers:
        parts += ["", "## Numbers", "", "| | |", "|---|---|"]
        parts += [f"| {key} | {_number(value)} |" for key, value in numbers.items()]
    if depth_shares:
        parts += ["", "Tokens by the number of their recursions:", "", "```text"]
        parts += [
            f"{count} {share:6.1%} {'#' * round(_BAR * share)}".rstrip()
            for count, share in enumerate(depth_shares)
            if count or share
        ]
        parts.append("```")
    return "\n".join([*parts, "", "## Use", "", *(_USE if use is None else use), ""])


_USE = (
    "```sh",
    "pip install mixture-of-recursions",
    "mor generate DIR --prompt 'Once upon a time' --show-depth",
    "```",
)


def write_card(folder: Path, text: str) -> None:
    """Write `README.md` into a model's folder.

    Raises:
        CheckpointError: the folder cannot be written.
        CapacityError: the disk is full.
    """
    try:
        write_file(folder / CARD, text.encode("utf-8"))
    except OSError as error:
        raise storage_error(folder / CARD, error, CheckpointError) from error


def _what(config: MoRConfig) -> str:
    """A sentence on the kind of model."""
    if config.num_recursions == 1:
        return "A plain (vanilla) Transformer of the Llama architecture, in the format of `mor`."
    if config.routing == "none":
        passes = f"passes the shared block {config.num_recursions} times"
        return f"A recursive Transformer: every token {passes}."
    kind = config.routing.replace("_", " ")
    return (
        f"A Mixture-of-Recursions model (arXiv 2507.10524) with {kind} routing: every token passes "
        f"the shared block up to {config.num_recursions} times, as a router decides."
    )


def _shape(config: MoRConfig) -> dict[str, str]:
    """Rows of the card's first table."""
    layers = f"{config.num_prelude_layers} + {config.num_block_layers} + {config.num_coda_layers}"
    heads, kv_heads, _ = config.num_heads_and_dim
    shape = {
        "parameters": f"{cost.num_parameters(config):,}",
        "layers (prelude + block + coda)": layers,
        "recursions": str(config.num_recursions),
        "effective layers": str(config.num_hidden_layers),
        "width, heads, key-value heads": f"{config.hidden_size}, {heads}, {kv_heads}",
        "vocabulary, positions": f"{config.vocab_size:,}, {config.max_position_embeddings:,}",
        "KV bytes per token, bf16": f"{cost.kv_bytes_per_token(config):,.0f}",
    }
    if config.relaxation_rank:
        shape["rank of each depth's LoRA pairs"] = str(config.relaxation_rank)
    if config.thresholds is not None:
        shape["thresholds"] = ", ".join(f"{t:.3f}" for t in config.thresholds)
    return shape


def _number(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value
