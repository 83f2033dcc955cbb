"""`mor bench serve`: a load on a running server, under vLLM's flag names."""

import asyncio
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mor.bench import serve, serve_offline
from mor.cli.options.engine_options import add_engine_options, engine_settings
from mor.cli.options.parser import Parser, parser
from mor.cli.options.sampling_options import add_sampling_options
from mor.errors import ConfigError, DataError, nearest
from mor.io.checkpoint import resolve
from mor.io.tokenizer import Tokenizer
from mor.machine import machine
from mor.serve.client import Client
from mor.terminal.console import console, err_console
from mor.terminal.table import print_table

EXAMPLES = (
    "mor bench serve --port 8000 --num-prompts 64 --max-concurrency 32 --ignore-eos",
    "mor bench serve --base-url http://10.0.0.2:8000 --request-rate 4 --goodput ttft:500 tpot:50",
    "mor bench serve --dataset-name custom --dataset-path prompts.jsonl --save-result",
    "mor bench serve runs/smoke --against offline  # what HTTP costs; --help has its options",
)
HELP = "Send requests to an OpenAI-compatible server; measure latency, throughput and goodput."
HELP_OFFLINE = "Start a server, and measure its streams against the engine alone, in turns."
EXAMPLES_OFFLINE = (
    "mor bench serve runs/smoke --against offline",
    "mor bench serve runs/smoke --against offline --quantization int8 --rounds 9 --json",
)
_DATASETS = ("random", "custom")
_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "ttft": "time to first token",
        "tpot": "time per output token",
        "itl": "between tokens",
        "e2el": "end to end",
    }
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    if any(arg.partition("=")[0] == "--against" for arg in args):
        return _against_offline(args)
    options = _parse(args)
    percentiles, metrics = _percentiles(options), _metrics(options)
    goodput = _goodput(options.goodput)
    traffic = serve.ArrivalProcess(
        request_rate=options.request_rate,
        burstiness=options.burstiness,
        max_concurrency=options.max_concurrency,
        seed=options.seed,
    )
    url = options.base_url or f"http://{options.host}:{options.port}"
    client = Client.of(url, options.api_key or os.environ.get("MOR_API_KEY"))
    outcomes, seconds = asyncio.run(_measure(client, options, traffic))
    result = serve.summarize(outcomes, seconds, percentiles=percentiles, goodput=goodput)
    record = {
        "bench": "serve",
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "machine": machine(),
        "base_url": client.url,
        "request_rate": "inf" if math.isinf(traffic.request_rate) else traffic.request_rate,
        "burstiness": traffic.burstiness,
        "max_concurrency": traffic.max_concurrency,
        "num_prompts": options.num_prompts,
        "seed": options.seed,
        **result,
    }
    if options.save_result:
        _save(options, record)
    if not options.json:
        _print(result, metrics, percentiles)
    console().print(json.dumps(record), soft_wrap=True, markup=False)
    return 0


def _parse(args: Sequence[str]) -> Any:
    p = parser("bench serve", HELP, EXAMPLES)
    p.add_argument("--base-url", default=None, help="address; otherwise that of --host and --port")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=8000)
    p.add_argument("--api-key", default=None, help="default: MOR_API_KEY of the environment")
    p.add_argument("--model", default=None, help="name to ask for; default: the first one served")
    p.add_argument("--tokenizer", default=None, help="its vocabulary is what random prompts use")
    _add_prompts(p)
    p.add_argument("--request-rate", type=float, default=math.inf, help="per second; default inf")
    p.add_argument("--burstiness", type=float, default=1.0, help="1: Poisson; below 1: in bursts")
    p.add_argument("--max-concurrency", type=int | None, default=None, help="requests under way")
    p.add_argument("--seed", type=int, default=0, help="of prompts, their order and arrivals")
    add_sampling_options(p, ("ignore_eos", "temperature", "min_recursions", "max_recursions"))
    p.add_argument("--percentile-metrics", default=",".join(serve.METRICS), help="rows to show")
    p.add_argument("--metric-percentiles", default="99", help="e.g. 50,90,99")
    p.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="e.g. ttft:500")
    p.add_argument("--json", action="store_true", help="print one JSON line, no table")
    p.add_argument("--save-result", action="store_true", help="write the record to a file, too")
    p.add_argument("--result-dir", default=".", help="folder of that file")
    p.add_argument("--result-filename", default=None, help="its name; default: model and date")
    return p.parse_args(list(args))


def _against_offline(args: Sequence[str]) -> int:
    p = parser("bench serve", HELP_OFFLINE, EXAMPLES_OFFLINE)
    p.add_argument("model", metavar="MODEL", help="folder of a checkpoint or run")
    p.add_argument("--against", required=True, help="offline, the one choice there is")
    p.add_argument("--max-concurrency", type=int, default=32, help="streams at once")
    p.add_argument("--random-input-len", type=int, default=128, help="tokens of each prompt")
    p.add_argument("--random-output-len", type=int, default=128, help="tokens to generate")
    p.add_argument("--rounds", type=int, default=5, help="pairs of timed runs")
    p.add_argument("--seed", type=int, default=0, help="of the prompts")
    add_engine_options(p, ("dtype", "quantization"))
    p.add_argument("--json", action="store_true", help="print one JSON line, no table")
    options = p.parse_args(list(args))
    if options.against != "offline":
        hint = nearest(options.against, ("offline",))
        raise ConfigError(f"--against {options.against!r} is unknown: {hint}")
    plan = serve_offline.OverheadConfig(
        model=resolve(options.model),
        max_concurrency=options.max_concurrency,
        random_input_len=options.random_input_len,
        random_output_len=options.random_output_len,
        rounds=options.rounds,
        seed=options.seed,
        **engine_settings(options),
    )
    with err_console().status("") as status:
        found = serve_offline.measure(plan, lambda what: status.update(f"measuring {what} ..."))
    record = {"bench": "serve", "machine": machine(), **found}
    if not options.json:
        rows = [
            (
                f"tokens/s, {plan.max_concurrency} streams",
                f"{found['http_tokens_per_s']:.1f}",
                f"{found['offline_tokens_per_s']:.1f}",
                f"cost {found['http_cost']:.1%}",
                f"{serve_offline.MAX_COST:.0%}",
            ),
            (
                "ms to the first token, idle",
                f"{found['ttft_ms']:.2f}",
                f"{found['prefill_ms']:.2f}",
                f"{found['ttft_ratio']:.3f} x",
                f"{serve_offline.MAX_WAIT:g} x",
            ),
        ]
        print_table(console(), ("", "HTTP", "engine alone", "median of pairs", "bar"), rows)
    console().print(json.dumps(record), soft_wrap=True, markup=False)
    return 0


def _add_prompts(p: Parser) -> None:
    p.add_argument("--num-prompts", type=int, default=100, help="requests to send")
    p.add_argument("--dataset-name", default="random", help=f"one of: {', '.join(_DATASETS)}")
    p.add_argument(
        "--dataset-path",
        default=None,
        help='JSON lines {"prompt": .., "output_tokens": ..}',
    )
    p.add_argument("--random-input-len", type=int, default=128, help="tokens of each prompt")
    p.add_argument("--random-output-len", type=int, default=128, help="tokens to generate")
    p.add_argument(
        "--random-range-ratio", type=float, default=0.0, help="lengths vary by this share"
    )
    p.add_argument(
        "--custom-output-len", type=int, default=128, help="where a line names no output_tokens"
    )


async def _measure(
    client: Client, options: Any, traffic: serve.ArrivalProcess
) -> tuple[list[serve.RawResponse], float]:
    """The timed responses and the seconds they took, after one request that is not timed."""
    card = await client.card(options.model)
    limits = ("min_recursions", "max_recursions")  # other servers do not know these fields
    extra = {name: getattr(options, name) for name in limits if getattr(options, name) is not None}
    extra |= {"ignore_eos": True} if options.ignore_eos else {}
    extra |= {"temperature": options.temperature, "seed": options.seed}
    requests = serve.completion_bodies(_asks(options, card), card["id"], extra)
    first, _ = await serve.send_all(client, requests[:1], serve.ArrivalProcess())
    serve.parse_response(first[0])
    with err_console().status(f"{len(requests)} requests to {client.url} ..."):
        return await serve.send_all(client, requests, traffic)


def _asks(options: Any, card: Mapping[str, Any]) -> list[serve.BenchRequest]:
    if options.dataset_name not in _DATASETS:
        hint = nearest(options.dataset_name, _DATASETS)
        raise ConfigError(f"--dataset-name {options.dataset_name!r} is unknown: {hint}")
    if options.dataset_name == "custom":
        if options.dataset_path is None:
            raise ConfigError("--dataset-name custom needs --dataset-path.")
        return serve.file_requests(
            Path(options.dataset_path),
            options.num_prompts,
            output_len=options.custom_output_len,
            seed=options.seed,
        )
    if options.dataset_path is not None:
        raise ConfigError("--dataset-path needs --dataset-name custom.")
    if options.tokenizer is not None:
        vocab_size = Tokenizer.load(options.tokenizer).vocab_size
    elif isinstance(card.get("vocab_size"), int):
        vocab_size = card["vocab_size"]
    else:
        raise ConfigError("the server does not say how large its vocabulary is: give --tokenizer.")
    return serve.random_requests(
        options.num_prompts,
        input_len=options.random_input_len,
        output_len=options.random_output_len,
        vocab_size=vocab_size,
        spread=options.random_range_ratio,
        seed=options.seed,
    )


def _percentiles(options: Any) -> list[float]:
    try:
        values = [float(part) for part in options.metric_percentiles.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(0 <= value <= 100 for value in values):
        raise ConfigError(
            f"--metric-percentiles={options.metric_percentiles!r} must be numbers from 0 to 100 "
            "with commas between them, e.g. 50,99."
        )
    return values


def _metrics(options: Any) -> list[str]:
    names = options.percentile_metrics.split(",")
    for name in names:
        if name not in serve.METRICS:
            hint = nearest(name, serve.METRICS)
            raise ConfigError(f"--percentile-metrics: {name!r} is unknown: {hint}")
    return names


def _goodput(pairs: Sequence[str]) -> dict[str, float]:
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        if name not in serve.METRICS:
            raise ConfigError(f"--goodput: {name!r} is unknown: {nearest(name, serve.METRICS)}")
        try:
            limits[name] = float(value)
        except ValueError as error:
            raise ConfigError(
                f"--goodput {pair!r} must be a metric and milliseconds, e.g. ttft:500."
            ) from error
    return limits


def _save(options: Any, record: Mapping[str, Any]) -> None:
    name = options.result_filename or f"serve-{record['date']}.json"
    path = Path(options.result_dir) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: the result cannot be written ({error.strerror}).") from error


def _print(result: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> None:
    screen = console()
    rows = [
        ("requests completed", f"{result['completed']:,}"),
        ("requests failed", f"{result['failed']:,}"),
        ("duration", f"{result['duration']:.2f} s"),
        ("input tokens", f"{result['total_input_tokens']:,}"),
        ("output tokens", f"{result['total_output_tokens']:,}"),
        ("requests per second", f"{result['request_throughput']:.2f}"),
        ("good requests per second", _number(result["request_goodput"], 2)),
        ("output tokens per second", f"{result['output_throughput']:.1f}"),
        ("all tokens per second", f"{result['total_token_throughput']:.1f}"),
        ("mean recursions per token", _number(result["mean_recursions"], 3)),
    ]
    print_table(screen, ("load", ""), [row for row in rows if row[1] != "-"])
    labels = ["mean", "median", *(f"p{p:g}" for p in percentiles)]
    latencies = [
        (_NAMES[name], *(_number(result[f"{label}_{name}_ms"], 2) for label in labels))
        for name in metrics
    ]
    print_table(screen, ("milliseconds", *labels), latencies)
    for error in result["errors"]:
        err_console().print(f"a request failed: {error}", markup=False)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
