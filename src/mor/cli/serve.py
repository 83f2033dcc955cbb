"""`mor serve`: an OpenAI-compatible server."""

import logging
import os
import ssl
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from mor import __version__
from mor.cli.options.parser import Parser, parser
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.errors import ConfigError, MissingExtraError
from mor.terminal.console import err_console

HELP = "Serve a model over HTTP, as OpenAI's clients expect it, and the depth page at /."

EXAMPLES = (
    "mor serve runs/smoke",
    "MOR_API_KEY=secret mor serve runs/smoke --host 0.0.0.0 --served-model-name smoke",
    "mor serve runs/smoke --max-num-seqs 32 --kv-cache-memory-bytes 1000000000 --quantization int8",
)

KEY = "MOR_API_KEY"
_LEVELS = ("debug", "info", "warning", "error")
_DTYPES: Mapping[str, Any] = MappingProxyType(  # vLLM's other names
    {"auto": None, "half": "float16", "float": "float32"}
)


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    try:
        from mor.serve.app import App
        from mor.serve.config import ServeConfig
        from mor.serve.served_model import ServedModel
        from mor.serve.server import Server, bind
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve") from error
    _set_up_logging(options.log_level)
    config = ServeConfig(
        model_names=tuple(options.served_model_name or [options.model]),
        api_keys=_keys(options.api_key),
        max_model_len=options.max_model_len,
        max_waiting=options.max_waiting,
        request_timeout=options.request_timeout,
        drain_timeout=options.drain_timeout,
        max_body_bytes=options.max_body_bytes,
        chat_template=_template(options.chat_template),
    )
    engine = _engine(options)
    _check_tls(options.ssl_keyfile, options.ssl_certfile)
    with bind(options.host, options.port) as socket:
        with err_console().status("starting the engine (once, compiling its kernels takes long)"):
            llm = LLM(options.model, engine)
            service = ServedModel(llm, config)
        logging.getLogger("mor.serve").info("%s", llm.describe())
        server = Server(
            App(service, __version__),
            ssl_keyfile=options.ssl_keyfile,
            ssl_certfile=options.ssl_certfile,
        )
        server.run([socket])
    return 0


def _parse(args: Sequence[str]) -> Any:
    p = parser("serve", HELP, EXAMPLES)
    p.add_argument("model", metavar="MODEL", help="folder of a checkpoint or of a run")
    p.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is all")
    p.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    p.add_argument(
        "--api-key",
        nargs="+",
        default=None,
        metavar="KEY",
        help=f"keys that clients must send; better in the environment's {KEY}, which nobody sees",
    )
    p.add_argument(
        "--served-model-name", nargs="+", default=None, metavar="NAME", help="default: MODEL"
    )
    _add_engine(p)
    _add_server(p)
    return p.parse_args(args)


def _add_engine(p: Parser) -> None:
    """The options that become an `EngineConfig`."""
    p.add_argument(
        "--max-model-len", type=int | None, default=None, help="tokens of prompt and output"
    )
    p.add_argument("--max-num-seqs", type=int, default=64, help="sequences in flight at most")
    p.add_argument(
        "--max-num-batched-tokens", type=int, default=512, help="tokens of one pass of the block"
    )
    p.add_argument(
        "--kv-cache-memory-bytes",
        type=int | None,
        default=None,
        help="for keys and values; default: what is needed, at most half of the free memory",
    )
    p.add_argument("--block-size", type=int, default=16, help="entries of a page of the cache")
    p.add_argument(
        "--no-enable-prefix-caching", action="store_true", help="compute every prompt anew"
    )
    p.add_argument("--dtype", default="auto", help="of the weights: auto, float32, bfloat16, ..")
    p.add_argument("--quantization", default=None, help="int8: weights and inputs, on a CPU")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument(
        "--num-scheduler-steps",
        type=int | None,
        default=None,
        help="decode ticks in a row before the host looks; default: 8 on a GPU, 1 on a CPU",
    )
    p.add_argument("--num-threads", type=int | None, default=None, help="of the CPU kernels")


def _add_server(p: Parser) -> None:
    """The options that become a `ServeConfig`."""
    p.add_argument("--chat-template", default=None, metavar="FILE", help="instead of the model's")
    p.add_argument(
        "--max-waiting", type=int, default=512, help="sequences that may wait; more get 429"
    )
    p.add_argument(
        "--request-timeout", type=float, default=600.0, metavar="S", help="until it is given up"
    )
    p.add_argument(
        "--drain-timeout", type=float, default=120.0, metavar="S", help="to finish after SIGTERM"
    )
    p.add_argument("--max-body-bytes", type=int, default=8 * 2**20, help="of a request")
    p.add_argument("--ssl-keyfile", default=None, metavar="FILE", help="to serve https")
    p.add_argument("--ssl-certfile", default=None, metavar="FILE", help="to serve https")
    p.add_argument("--log-level", default="info", choices=_LEVELS, help="info: a line per request")


def _keys(given: Sequence[str] | None) -> tuple[str, ...]:
    """From the command line, otherwise from the environment."""
    if given is not None:
        return tuple(given)
    return (os.environ[KEY],) if KEY in os.environ else ()


def _engine(options: Any) -> EngineConfig:
    if options.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={options.device!r} is unknown: use auto, cpu or cuda.")
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        raise ConfigError("device='cuda': torch sees no GPU here; use --device cpu.")
    return EngineConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
        block_size=options.block_size,
        enable_prefix_caching=not options.no_enable_prefix_caching,
        dtype=_DTYPES.get(options.dtype, options.dtype),
        quantization=options.quantization,
        device="cuda" if has_gpu and options.device != "cpu" else "cpu",
        num_threads=options.num_threads,
        num_scheduler_steps=options.num_scheduler_steps,
    )


def _template(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template={path} cannot be read: {error}.") from error


def _check_tls(keyfile: str | None, certfile: str | None) -> None:
    if keyfile is None and certfile is None:
        return
    try:
        if certfile is None:
            raise OSError("there is no certificate")
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
    except OSError as error:
        raise ConfigError(
            f"--ssl-certfile={certfile} --ssl-keyfile={keyfile} cannot be used: {error}."
        ) from error


def _set_up_logging(level: str) -> None:
    """One line each on standard error; of uvicorn only what is wrong."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, minimum in (("mor.serve", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(minimum)
        logger.propagate = False
