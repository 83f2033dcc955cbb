"""`mor eval`: loss under both selection rules, depths and routers; or tasks (`eval_tasks`)."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from mor.cli import eval_tasks
from mor.cli.options.config_options import flag
from mor.cli.options.engine_options import add_engine_options, engine_config
from mor.cli.options.model_options import open_model
from mor.cli.options.parser import parser
from mor.cli.train import load_train_config
from mor.data.batches import TokenShards, sequential_windows
from mor.data.mixture import sequence_quotas, spread_mixture
from mor.data.shards import INDEX_FILE
from mor.data.sources import Document, SourceDocuments
from mor.data.stdlib_corpus import stdlib_documents
from mor.errors import ConfigError, DataError
from mor.eval.depth import TokenDepth, extremes, tokens_by_depth
from mor.eval.loss import (
    TextLoss,
    Window,
    batched,
    check_length,
    check_vocabulary,
    evaluate_windows,
    perplexity,
    text_windows,
)
from mor.eval.quantization_loss import QuantizationLoss, quantization_loss
from mor.io.checkpoint import resolve
from mor.io.tokenizer import Tokenizer
from mor.model.router import ExpertChoiceRouter
from mor.model.transformer import MoRModel
from mor.terminal.console import console, progress
from mor.terminal.table import print_table
from mor.train.calibrate import calibrate
from mor.train.config import STDLIB, TrainConfig

HELP = "Loss of a model under both selection rules, depth histogram, router accuracy."

EXAMPLES = (
    "mor eval runs/smoke",
    "mor eval runs/smoke --data book.txt --calibrate 16 --by-token 20",
    "mor eval runs/smoke --quantization int8",
    "mor eval runs/360m-mor3 --data data/web --max-windows 256 --json",
    "mor eval models/smollm2 --tasks hellaswag,blimp --data data/eval --limit 200",
)

_MIN_OCCURRENCES = 5  # of a token in --by-token


@dataclass(frozen=True, kw_only=True)
class _Text:
    """A text to evaluate on; each call of `windows` starts at its beginning."""

    name: str
    windows: Callable[[], Iterator[Window]]
    num_windows: int | None
    """None: not known before all text is read."""
    calibration: Callable[[], Iterator[Window]]


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    if options.tasks is not None:
        return eval_tasks.run(options)
    model, tokenizer = open_model(options.model, options.device)
    text, length = _open_text(options, model, tokenizer)
    end = _document_end(options.model, tokenizer)
    if options.calibrate:
        if not isinstance(model.router, ExpertChoiceRouter):
            raise ConfigError(
                f"--calibrate={options.calibrate} needs a model with routing='expert_choice'; "
                f"this one has routing={model.config.routing!r} and no thresholds."
            )
        model.set_thresholds(calibrate(model, list(batched(text.calibration())), end))
    loss = evaluate_windows(model, tokenizer, _watched(text, "evaluating"), end)
    tokens: list[TokenDepth] | None = None
    if options.by_token:
        tokens = tokens_by_depth(model, tokenizer, _watched(text, "depth by token"), end)
    cost: QuantizationLoss | None = None
    if options.quantization or options.dtype:
        rounded = engine_config(options, enable_prefix_caching=False)
        cost = quantization_loss(model, _watched(text, "rounded weights"), rounded)
    if options.json:
        record = _as_json(options, model, text, length, loss, tokens)
        print(json.dumps(record | ({"rounded_weights": cost.as_dict()} if cost else {})))
        return 0
    screen = console()
    _print_loss(screen, options.model, model, text, length, loss)
    if cost is not None:
        screen.print(
            f"{options.quantization or options.dtype} weights in the engine: NLL "
            f"{cost.nll_rounded:.4f} against {cost.nll:.4f} ({cost.nll_rounded - cost.nll:+.4f}); "
            f"{cost.changed_counts:.2%} of the tokens take another number of recursions."
        )
    if tokens is not None:
        _print_tokens(screen, *extremes(tokens, options.by_token, _MIN_OCCURRENCES))
    return 0


def _parse(args: Sequence[str]) -> Any:
    p = parser("eval", HELP, EXAMPLES)
    p.add_argument("model", metavar="MODEL", help="folder of a checkpoint or of a run")
    p.add_argument(
        "--data",
        default=None,
        metavar="DATA",
        help="corpus (its valid split), .txt, .jsonl, .jsonl.zst, a folder of them, or stdlib; "
        "default: the corpus of the run; with --tasks: the folder of evaluation sets",
    )
    p.add_argument(
        "--sequence-length",
        type=int | None,
        default=None,
        help="tokens in a window; default: the run's, or all that the model can take",
    )
    p.add_argument("--max-windows", type=int | None, default=None, help="default: all")
    p.add_argument(
        "--calibrate",
        type=int,
        default=0,
        metavar="N",
        help="first fit the thresholds on N windows: of the train split, or of the text's "
        "beginning, which is then not evaluated on",
    )
    p.add_argument("--by-token", type=int, default=0, metavar="N", help="N deepest, N shallowest")
    add_engine_options(
        p,
        ("device", "dtype", "quantization"),
        helps={
            "quantization": "int8: also run the engine with rounded weights, and say what they "
            "cost; with --tasks: run it with those alone",
            "dtype": "likewise with weights in bfloat16",
        },
    )
    p.add_argument("--json", action="store_true", help="one JSON object")
    eval_tasks.add_options(p)
    options = p.parse_args(args)
    eval_tasks.check_options(options)
    for name in ("sequence_length", "max_windows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{flag(name)}={value} must be at least 1.")
    for name in ("calibrate", "by_token"):
        if getattr(options, name) < 0:
            value = getattr(options, name)
            raise ConfigError(f"{flag(name)}={value} must be 0 (off) or more.")
    return options


# -- what to evaluate on ------------------------------------------------------------------------


def _open_text(options: Any, model: MoRModel, tokenizer: Tokenizer) -> tuple[_Text, int]:
    """The text and the length of its windows."""
    run_folder, settings = _run_settings(options.model)
    limit = model.config.max_position_embeddings
    length = options.sequence_length or min(settings.sequence_length if settings else limit, limit)
    check_length(model, length)
    own = settings.data if settings else None
    if options.data is None and settings is not None and own != STDLIB:
        corpora = [(Path(path), weight) for path, weight in settings.corpora]
        return _corpora(corpora, length, options, model, tokenizer), length
    data: str | None = options.data or (STDLIB if own == STDLIB else None)
    if data is None:
        raise ConfigError(
            f"{options.model} is no training run, so there is no text that belongs to it: give "
            "--data, a corpus or a text file."
        )
    if data == STDLIB and own == STDLIB:
        corpora = [(run_folder / "data", 1.0)]
        return _corpora(corpora, length, options, model, tokenizer), length
    if data == STDLIB:
        return _documents(STDLIB, stdlib_documents, length, options, tokenizer), length
    if (Path(data) / INDEX_FILE).is_file():
        return _corpora([(Path(data), 1.0)], length, options, model, tokenizer), length
    documents = SourceDocuments([Path(data)])
    return _documents(str(data), lambda: documents, length, options, tokenizer), length


def _run_settings(model: str) -> tuple[Path, TrainConfig | None]:
    """The folder of the run that a model belongs to, and its settings if it is one."""
    checkpoint = resolve(model)
    run_folder = checkpoint.parent.parent
    file = run_folder / "config.yaml"
    known = checkpoint.parent.name == "checkpoints" and file.is_file()
    return run_folder, load_train_config(file) if known else None


def _document_end(model: str, tokenizer: Tokenizer) -> int | None:
    """The id at which attention stops, if the model was trained so."""
    settings = _run_settings(model)[1]
    return tokenizer.eos_id if settings is not None and settings.mask_documents else None


def _corpora(
    corpora: Sequence[tuple[Path, float]],
    length: int,
    options: Any,
    model: MoRModel,
    tokenizer: Tokenizer,
) -> _Text:
    """The held-out text of a corpus, or of several with their weights, one after another."""
    paths, weights = [path for path, _ in corpora], [weight for _, weight in corpora]
    valid = [TokenShards.open(path, "valid") for path in paths]
    for path, shards in zip(paths, valid, strict=True):
        check_vocabulary(model, shards.vocab_size, str(path))
        if Tokenizer.load(path).to_json() != tokenizer.to_json():
            raise DataError(
                f"{path}: made with another tokenizer than the model's: give the text itself, or "
                f"build it again with `mor data build --tokenizer {resolve(options.model)}`."
            )
    counts = [(shards.num_tokens - 1) // length for shards in valid]
    if options.max_windows:
        wanted = sequence_quotas(weights, max(options.max_windows, len(weights)))
        counts = [min(pair) for pair in zip(counts, wanted, strict=True)]

    def windows() -> Iterator[Window]:
        for shards, count in zip(valid, counts, strict=True):
            yield from sequential_windows(shards, length, max(1, count))

    def calibration() -> Iterator[Window]:
        train = [TokenShards.open(path, "train", verify=False) for path in paths]
        return iter(spread_mixture(train, weights, length, options.calibrate).numpy())

    return _Text(
        name=f"{' + '.join(map(str, paths))} (valid)",
        windows=windows,
        num_windows=sum(counts),
        calibration=calibration,
    )


def _documents(
    name: str,
    documents: Callable[[], Iterable[Document]],
    length: int,
    options: Any,
    tokenizer: Tokenizer,
) -> _Text:
    held_back = options.calibrate

    def windows() -> Iterator[Window]:
        stop = None if options.max_windows is None else held_back + options.max_windows
        return islice(text_windows(tokenizer, documents(), length), held_back, stop)

    def calibration() -> Iterator[Window]:
        return islice(text_windows(tokenizer, documents(), length), held_back)

    if held_back and next(windows(), None) is None:
        raise DataError(
            f"{name}: --calibrate={held_back} windows of {length} tokens are all of it, and none "
            "is left to evaluate on: take fewer, or a shorter --sequence-length."
        )
    return _Text(name=name, windows=windows, num_windows=None, calibration=calibration)


def _watched(text: _Text, what: str) -> Iterator[Tensor]:
    """The text's batches, with a progress bar."""
    with progress() as bar:
        task = bar.add_task(what, total=text.num_windows)
        for batch in batched(text.windows()):
            yield batch
            bar.advance(task, len(batch))


# -- what came out ------------------------------------------------------------------------------


def _as_json(
    options: Any,
    model: MoRModel,
    text: _Text,
    length: int,
    loss: TextLoss,
    tokens: list[TokenDepth] | None,
) -> dict[str, Any]:
    values: dict[str, Any] = {
        "model": options.model,
        "checkpoint": str(resolve(options.model)),
        "data": text.name,
        "sequence_length": length,
        **loss.as_dict(),
        "num_recursions": model.config.num_recursions,
        "thresholds": model.config.thresholds,
        "calibration_windows": options.calibrate,
    }
    if tokens is not None:
        deepest, shallowest = extremes(tokens, options.by_token, _MIN_OCCURRENCES)
        values["by_token"] = {
            "min_occurrences": _MIN_OCCURRENCES,
            "deepest": [dataclasses.asdict(token) for token in deepest],
            "shallowest": [dataclasses.asdict(token) for token in shallowest],
        }
    return {key: None if _not_json(value) else value for key, value in values.items()}


def _not_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _print_loss(
    screen: Console, name: str, model: MoRModel, text: _Text, length: int, loss: TextLoss
) -> None:
    result = loss.evaluation
    screen.print(f"{name} on {text.name}", markup=False)
    screen.print(
        f"{loss.num_windows:,} windows of {result.tokens // loss.num_windows:,} tokens: "
        f"{result.tokens:,} tokens, {loss.num_bytes:,} bytes"
    )
    pair = (result.nll_topk, result.nll_threshold)
    rows = [
        _loss_row("NLL, nats per token", pair),
        _loss_row("perplexity", (perplexity(pair[0]), perplexity(pair[1])), digits=3),
        _loss_row("bits per byte", (loss.bits_per_byte(pair[0]), loss.bits_per_byte(pair[1]))),
    ]
    print_table(screen, ("", "topk", "threshold", "gap"), rows)
    shares = result.depth_histogram
    rows = [
        (str(count), f"{share:.1%}") for count, share in enumerate(shares) if count or share > 0
    ]
    screen.print()
    print_table(screen, ("recursions", "tokens"), rows)
    parts = [f"mean recursions {loss.mean_recursions:.3f} of {model.config.num_recursions}"]
    if result.router_accuracy is not None:
        parts.append(f"router accuracy {result.router_accuracy:.3f}")
    if result.dead_share is not None:
        parts.append(f"dead share {result.dead_share:.3f}")
    screen.print(", ".join(parts))


def _loss_row(name: str, pair: tuple[float, float], digits: int = 4) -> tuple[str, ...]:
    topk, threshold = pair
    gap = threshold - topk
    return name, f"{topk:.{digits}f}", f"{threshold:.{digits}f}", f"{gap:+.{digits}f}"


def _print_tokens(screen: Console, deepest: list[TokenDepth], shallowest: list[TokenDepth]) -> None:
    for title, tokens in (("deepest tokens", deepest), ("shallowest tokens", shallowest)):
        screen.print()
        if not tokens:
            screen.print(f"{title}: none occurs {_MIN_OCCURRENCES} times or more.")
            continue
        rows = [
            (
                repr(token.piece),
                str(token.token_id),
                f"{token.mean_recursions:.3f}",
                f"{token.occurrences:,}",
            )
            for token in tokens
        ]
        print_table(screen, (title, "id", "mean recursions", "occurrences"), rows)
