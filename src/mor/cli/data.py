"""`mor data`: turn text into tokenized shards, and look at them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console

from mor.cli.options.parser import parser
from mor.data.batches import TokenShards
from mor.data.corpus import build_corpus
from mor.data.shards import CorpusIndex
from mor.errors import ConfigError, nearest
from mor.terminal.console import console, fail, progress
from mor.terminal.table import print_table

HELP = "Turn text into tokenized shards, and look at them."

EXAMPLES = (
    "mor data build book.txt notes/ --out data/mine --train-tokenizer 8192",
    "mor data build web.jsonl.zst --out data/web --tokenizer runs/old/data --valid-fraction 0.001",
    "mor data build rows/*.parquet --valid held-out.jsonl --out data/rows --train-tokenizer 8192",
    "mor data build hf:HuggingFaceFW/fineweb-edu:sample-10BT --hub-documents 100000 --out data/edu"
    " --train-tokenizer 16384",
    "mor data info data/mine",
)

SUBVERBS: Mapping[str, str] = MappingProxyType(
    {
        "build": "tokenize text, JSON lines, parquet, Hugging Face datasets, and folders of them",
        "info": "what a corpus holds, its shards compared with their checksums",
    }
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    if not args or args[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if args[0] not in SUBVERBS:
        known = nearest(args[0], SUBVERBS)
        return fail(f"unknown verb 'data {args[0]}': {known}\n  `mor data --help` tells more.", 2)
    return _build(args[1:]) if args[0] == "build" else _info(args[1:])


def _usage() -> str:
    rows = "\n".join(f"  {verb:<8}{what}" for verb, what in SUBVERBS.items())
    examples = "\n".join(f"  {example}" for example in EXAMPLES)
    return (
        f"usage: mor data VERB ...\n\n{HELP}\n\nverbs:\n{rows}\n\nexamples:\n{examples}\n\n"
        "`mor data VERB --help` tells more.\n"
    )


def _build_options(args: Sequence[str]) -> Any:
    p = parser("data build", "Tokenize text into a corpus, whole or not at all.", EXAMPLES[:-1])
    p.add_argument(
        "sources",
        nargs="+",
        metavar="SRC",
        help=".txt .md .rst .py .jsonl .jsonl.zst .parquet, folders of them, folders saved by "
        "Hugging Face's datasets, or hf:OWNER/NAME:CONFIG@SPLIT on its hub",
    )
    p.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    p.add_argument("--tokenizer", default=None, metavar="PATH", help="tokenizer.json or its folder")
    p.add_argument(
        "--train-tokenizer",
        type=int | None,
        default=None,
        metavar="VOCAB",
        help="or train one with so many entries on these texts",
    )
    p.add_argument("--valid-fraction", type=float, default=0.01, help="of documents, held out")
    p.add_argument(
        "--valid", nargs="+", default=[], metavar="SRC", help="hold out these sources instead"
    )
    p.add_argument(
        "--workers",
        type=int | None,
        default=None,
        metavar="N",
        help="processes that encode; default: one a core, fewer for little text",
    )
    p.add_argument(
        "--hub-documents",
        type=int | None,
        default=None,
        metavar="N",
        help="the most documents to take of a dataset on the hub",
    )
    p.add_argument("--shard-tokens", type=int, default=100_000_000, help="tokens in a shard")
    p.add_argument("--text-field", default="text", help="field or column with the text")
    p.add_argument("--seed", type=int, default=0, help="of the choice of held-out documents")
    p.add_argument("--overwrite", action="store_true", help="replace the corpus in --out")
    options = p.parse_args(args)
    if (options.tokenizer is None) == (options.train_tokenizer is None):
        raise ConfigError(
            "a corpus needs one tokenizer: give either --tokenizer PATH, to use that one, or "
            "--train-tokenizer VOCAB, to train one with so many entries on the texts."
        )
    return options


def _build(args: Sequence[str]) -> int:
    options = _build_options(args)
    with progress() as bar:
        task = bar.add_task("reading", total=None)
        summary = build_corpus(
            options.sources,
            Path(options.out),
            tokenizer=None if options.tokenizer is None else Path(options.tokenizer),
            train_tokenizer=options.train_tokenizer,
            valid_fraction=options.valid_fraction,
            valid=options.valid,
            workers=options.workers,
            hub_documents=options.hub_documents,
            shard_tokens=options.shard_tokens,
            text_field=options.text_field,
            seed=options.seed,
            overwrite=options.overwrite,
            progress=lambda done, total: bar.update(
                task, description="documents", completed=done, total=total
            ),
        )
    screen = console()
    out = Path(options.out)
    _print_summary(screen, out, CorpusIndex.read(out))
    if summary.num_empty_documents:
        _say(screen, f"left out: {summary.num_empty_documents:,} documents without text.")
    _say(screen, f"next: `mor train configs/135m-mor3.yaml --data {out} --out runs/mine`")
    return 0


def _info(args: Sequence[str]) -> int:
    p = parser("data info", "What a corpus holds; every shard is read and checked.", EXAMPLES[-1:])
    p.add_argument("corpus", metavar="DIR", help="folder that `mor data build` wrote")
    folder = Path(p.parse_args(args).corpus)
    index = CorpusIndex.read(folder)
    for split, shards in index.splits.items():
        if shards:
            TokenShards.open(folder, split, verify=True)
    screen = console()
    _print_summary(screen, folder, index)
    _say(screen, "all shards agree with their checksums.")
    return 0


def _print_summary(screen: Console, folder: Path, index: CorpusIndex) -> None:
    _say(screen, f"{folder}: vocabulary {index.vocab_size:,}, ids stored as {index.dtype}")
    rows = [
        (
            split,
            f"{sum(shard.num_documents for shard in shards):,}",
            f"{sum(shard.num_tokens for shard in shards):,}",
            f"{len(shards):,}",
        )
        for split, shards in index.splits.items()
    ]
    print_table(screen, ("split", "documents", "tokens", "shards"), rows)


def _say(screen: Console, line: str) -> None:
    """A line that is not broken, so that it can be copied; square brackets are only text."""
    screen.print(line, markup=False, soft_wrap=True)
