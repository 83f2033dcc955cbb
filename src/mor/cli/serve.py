"""`mor serve`: an OpenAI-compatible server."""

import logging
import os
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mor import __version__
from mor.cli.options.config_options import add_field_options, field_values
from mor.cli.options.engine_options import add_engine_options, engine_config
from mor.cli.options.parser import Parser, parser
from mor.engine.llm import LLM
from mor.errors import ConfigError, MissingExtraError
from mor.serve.config import ServeConfig
from mor.terminal.console import err_console

HELP = "Serve a model over HTTP, as OpenAI's clients expect it, and the depth page at /."

EXAMPLES = (
    "mor serve runs/smoke",
    "MOR_API_KEY=secret mor serve runs/smoke --host 0.0.0.0 --served-model-name smoke",
    "mor serve runs/smoke --max-num-seqs 32 --kv-cache-memory-bytes 1000000000 --quantization int8",
)

KEY = "MOR_API_KEY"
_SERVER_OPTIONS = (  # fields of ServeConfig whose option has the same name
    *("max_model_len", "max_waiting", "max_body_bytes", "request_timeout", "drain_timeout"),
)
_LEVELS = ("debug", "info", "warning", "error")


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    try:
        from mor.serve.app import App
        from mor.serve.served_model import ServedModel
        from mor.serve.server import Server, bind
    except ModuleNotFoundError as error:
        raise MissingExtraError(str(error.name), "serve") from error
    _set_up_logging(options.log_level)
    config = ServeConfig(
        model_names=tuple(options.served_model_name or [options.model]),
        api_keys=_keys(options.api_key),
        **field_values(options, ServeConfig) | {"chat_template": _template(options.chat_template)},
    )
    engine = engine_config(options)
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
    _add_server_options(p)
    add_engine_options(p)
    return p.parse_args(args)


def _add_server_options(p: Parser) -> None:
    """The options that become a `ServeConfig`, and those of the connection."""
    add_field_options(p, ServeConfig, _SERVER_OPTIONS)
    p.add_argument("--chat-template", default=None, metavar="FILE", help="instead of the model's")
    p.add_argument("--ssl-keyfile", default=None, metavar="FILE", help="to serve https")
    p.add_argument("--ssl-certfile", default=None, metavar="FILE", help="to serve https")
    p.add_argument("--log-level", default="info", choices=_LEVELS, help="info: a line per request")


def _keys(given: Sequence[str] | None) -> tuple[str, ...]:
    """The keys of the command line, otherwise the one of the environment."""
    if given is not None:
        return tuple(given)
    return (os.environ[KEY],) if KEY in os.environ else ()


def _template(path: str | None) -> str | None:
    """The text of the chat template's file."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template={path} cannot be read: {error}.") from error


def _check_tls(keyfile: str | None, certfile: str | None) -> None:
    """Raise ConfigError if key and certificate cannot be used: uvicorn would say so late."""
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
    """Log to standard error; of uvicorn only warnings and errors."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, minimum in (("mor.serve", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(minimum)
        logger.propagate = False
