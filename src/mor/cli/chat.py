"""`mor chat`: talk with a model in the terminal, its tokens colored by recursion count."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from rich.console import Console

from mor.cli.chat_backends import (
    ChatBackend,
    ChatMessage,
    LocalChatBackend,
    RemoteChatBackend,
    template_of,
)
from mor.cli.options.engine_options import add_engine_options, engine_config
from mor.cli.options.model_options import open_model, start_engine
from mor.cli.options.parser import parser
from mor.cli.options.sampling_options import add_sampling_options, sampling_params
from mor.errors import ConfigError, MorError, nearest
from mor.model.sampling import SamplingParams
from mor.report.palette import MAX_RECURSIONS
from mor.terminal.color import colored_text, depth_legend
from mor.terminal.console import console, err_console, fail

EXAMPLES = (
    "mor chat runs/smoke",
    "mor chat runs/smoke --quantization int8 --max-recursions 2",
    "MOR_API_KEY=secret mor chat http://127.0.0.1:8000 --system 'Answer in one sentence.'",
    "echo 'Once upon a time' | mor chat runs/smoke",
)
HELP = (
    "Talk with a model: a checkpoint's folder, or the address of an OpenAI-compatible server. "
    "Ctrl-C ends an answer, Ctrl-D or /quit the talk."
)
COMMANDS = (
    "/reset             forget what was said",
    "/max-recursions N  at most N recursions per token; without N the router decides",
    "/temperature X     0 takes the likeliest token",
    "/help              this list",
    "/quit              leave; so does Ctrl-D",
)
KEY = "MOR_API_KEY"
_ONLY_LOCAL = ("device", "dtype", "quantization")
_ONLY_REMOTE = ("api_key", "model")
_SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_p", "seed", "max_recursions")


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    params = sampling_params(options)
    backend = _open_backend(options)
    chat = _Chat(backend, params, options.system)
    if options.max_recursions is not None:  # now it is known how many the model has
        chat.limit_recursions(str(options.max_recursions))
    chat.greet()
    chat.loop()
    return 0


def _parse(args: Sequence[str]) -> Any:
    p = parser("chat", HELP, EXAMPLES)
    p.add_argument(
        "partner", metavar="MODEL|URL", help="folder of a checkpoint or run, or http://.."
    )
    p.add_argument("--system", default=None, metavar="TEXT", help="what the model is told first")
    add_sampling_options(p, _SAMPLING_OPTIONS, max_tokens=256, temperature=0.7)
    p.add_argument("--api-key", default=None, help=f"for a URL; default: {KEY} of the environment")
    p.add_argument("--model", default=None, help="for a URL: name to ask for; default: the first")
    add_engine_options(p, _ONLY_LOCAL, device=None)
    return p.parse_args(list(args))


def _open_backend(options: Any) -> ChatBackend:
    is_remote = "://" in options.partner
    for name in _ONLY_LOCAL if is_remote else _ONLY_REMOTE:
        if getattr(options, name) is not None:
            what = "a folder, not a URL" if is_remote else "a URL, not a folder"
            raise ConfigError(f"--{name.replace('_', '-')} is for {what}: leave it out.")
    if is_remote:
        from mor.serve.client import Client

        key = options.api_key or os.environ.get(KEY)
        return RemoteChatBackend(Client.of(options.partner, key), options.model)
    model, tokenizer = open_model(options.partner, options.device)
    llm = start_engine(model, engine_config(options, max_num_seqs=1), tokenizer)
    return LocalChatBackend(options.partner, llm, tokenizer, template_of(tokenizer))


class _Chat:
    """A conversation, and the parameters of its next answer."""

    def __init__(self, backend: ChatBackend, params: SamplingParams, system: str | None) -> None:
        self._backend, self._params = backend, params
        self._screen = console()
        self._opening = [] if system is None else [ChatMessage("system", system)]
        self._turns = list(self._opening)
        self._commands: Mapping[str, Callable[[str], None]] = MappingProxyType(
            {
                "reset": self._reset,
                "max-recursions": self._max_recursions,
                "temperature": self._temperature,
                "help": self._help,
            }
        )

    # -- around the talk ------------------------------------------------------------------------

    def greet(self) -> None:
        """Print the model's name and the legend, on a terminal only: a pipe gets answers alone."""
        notes = err_console()
        if not self._backend.has_template:
            notes.print(
                f"{self._backend.name} has no chat template: it does not answer, it continues the "
                "text of the conversation.",
                style="yellow",
                markup=False,
            )
        if sys.stdin.isatty():
            notes.print(f"{self._backend.name}; /help lists the commands.", markup=False)
            if self._screen.is_terminal and 1 < self._backend.num_recursions <= MAX_RECURSIONS:
                self._screen.print(depth_legend(self._backend.num_recursions))

    def loop(self) -> None:
        """Answer each line until the input ends or /quit comes."""
        while (line := self._read()) is not None:
            text = line.strip()
            if text in ("/quit", "/exit"):
                return
            try:
                if text.startswith("/"):
                    self._command(*text[1:].partition(" ")[::2])
                elif text:
                    self._say(line.removesuffix("\n"))
            except MorError as error:
                fail(str(error))

    def _read(self) -> str | None:
        """The next line; None at the end of the input."""
        if not sys.stdin.isatty():
            return sys.stdin.readline() or None
        import readline  # noqa: F401  (gives `input` editing and a history)

        while True:
            try:
                return input("> ")
            except EOFError:
                self._screen.print()
                return None
            except KeyboardInterrupt:
                err_console().print("\n/quit or Ctrl-D leaves.")

    # -- the talk -------------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        turns = [*self._turns, ChatMessage("user", text)]
        answer = _Answer(self._screen, self._backend.num_recursions)
        try:
            self._backend.answer(turns, self._params, answer.add)
        except KeyboardInterrupt:  # ends the answer; its tokens so far stay in the conversation
            answer.end("interrupted")
        else:
            answer.end()
        finally:
            if answer.num_tokens:
                self._turns = [*turns, ChatMessage("assistant", answer.text)]
        if self._params.seed is not None:  # the next answer has other random numbers
            self._params = replace(self._params, seed=self._params.seed + 1)

    # -- commands -------------------------------------------------------------------------------

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            hint = nearest(name, (*self._commands, "quit"))
            raise ConfigError(f"/{name} is no command: {hint}")
        self._commands[name](argument.strip())

    def _help(self, _: str) -> None:
        err_console().print("\n".join(COMMANDS), markup=False)

    def _reset(self, _: str) -> None:
        self._turns = list(self._opening)
        err_console().print("forgotten.")

    def _max_recursions(self, argument: str) -> None:
        self.limit_recursions(argument)
        limit = self._params.max_recursions
        plural = "" if limit == 1 else "s"
        said = "as the router decides" if limit is None else f"at most {limit} recursion{plural}"
        err_console().print(f"{said}.")

    def _temperature(self, argument: str) -> None:
        try:
            value = float(argument)
        except ValueError as error:
            raise ConfigError(f"temperature={argument!r} must be a finite number >= 0.") from error
        self._params = replace(self._params, temperature=value)
        err_console().print(f"temperature {value:g}.")

    def limit_recursions(self, argument: str) -> None:
        """Set `max_recursions` to the number in a text; an empty text takes the limit away.

        Raises:
            ConfigError: the model cannot take so many.
        """
        maximum = self._backend.num_recursions
        if argument and not (argument.isdecimal() and 1 <= int(argument) <= maximum):
            raise ConfigError(f"max_recursions={argument!r} must be a number from 1 to {maximum}.")
        self._params = replace(self._params, max_recursions=int(argument) if argument else None)


class _Answer:
    """Writes an answer token by token, and a line of statistics when it ends."""

    def __init__(self, screen: Console, num_recursions: int) -> None:
        self._screen, self._num_recursions = screen, num_recursions
        self._colored = screen.is_terminal and num_recursions <= MAX_RECURSIONS
        self._parts: list[str] = []
        self._counts: list[int] = []
        self._began = time.perf_counter()

    @property
    def text(self) -> str:
        """The text of the tokens so far."""
        return "".join(self._parts)

    @property
    def num_tokens(self) -> int:
        return len(self._counts)

    def add(self, piece: str, count: int) -> None:
        """Write the text of a token, in the color of its recursion count."""
        self._parts.append(piece)
        self._counts.append(count)
        if not piece:
            return
        if not self._screen.is_terminal:
            self._screen.file.write(piece)
            self._screen.file.flush()
            return
        shown = max(1, count) if self._colored else 1
        text = colored_text([piece], [shown], self._num_recursions if self._colored else 1)
        self._screen.print(text, end="", soft_wrap=True)

    def end(self, note: str = "") -> None:
        """End the line; on a terminal print mean recursions and tokens per second."""
        self._screen.print()
        if not self._screen.is_terminal or not self._counts:
            return
        seconds = time.perf_counter() - self._began
        words = [f"{len(self._counts)} tokens", f"{len(self._counts) / seconds:.1f} tokens/s"]
        if self._num_recursions > 1:
            mean = sum(self._counts) / len(self._counts)
            words.append(f"{mean:.2f} of {self._num_recursions} recursions on average")
        self._screen.print(", ".join([*filter(None, [note]), *words]), style="dim", markup=False)
