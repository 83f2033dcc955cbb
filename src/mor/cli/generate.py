"""`mor generate`: continue a prompt, coloured by recursion count."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mor.bench.palette import MAX_RECURSIONS
from mor.cli.colour import coloured_text, depth_legend
from mor.cli.table import print_table
from mor.cli.terminal import console, parser
from mor.errors import ConfigError, DataError
from mor.eval.depth import depth_histogram, mean_recursions, recursion_counts
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import Tokenizer
from mor.model.generation import Completion, SamplingParams, generate
from mor.model.mor import MoRModel

HELP = "Continue a prompt; without one, start a text from nothing."

EXAMPLES = (
    "mor generate runs/smoke --prompt 'def main' --show-depth",
    "mor generate runs/smoke --prompt 'import' --temperature 0.8 --top-p 0.95 --num-samples 3",
    "git diff | mor generate runs/smoke --max-tokens 20 --json -",
)

_MAX_TOKENS = 64
_BAR = 30  # characters of the histogram's longest bar
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    model, tokenizer = open_model(options.model, options.device)
    prompt = _prompt(options)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    room = model.config.max_position_embeddings - len(prompt_ids)
    stop = () if options.ignore_eos else (tokenizer.eos_id,)
    params = _params(options, max(1, min(_MAX_TOKENS, room)), stop)
    if options.json:
        for completion in generate(model, [prompt_ids] * len(params), params):
            print(json.dumps(completion_dict(tokenizer, completion)))
        return 0
    screen = console()
    for number, one in enumerate(params, start=1):
        if len(params) > 1:
            screen.print(f"-- {number} of {len(params)}", style="dim", markup=False)
        writer = _Writer(screen, model, tokenizer, prompt_ids, options.show_depth, one)
        (completion,) = generate(model, [prompt_ids], one, on_token=writer.on_token)
        writer.end()
        if options.show_depth:
            _print_depths(screen, model, completion)
    return 0


def _parse(args: Sequence[str]) -> Any:
    p = parser("generate", HELP, EXAMPLES)
    p.add_argument("model", metavar="MODEL", help="folder of a checkpoint or of a run")
    p.add_argument("stdin", nargs="?", choices=("-",), help="read the prompt from standard input")
    p.add_argument("--prompt", metavar="TEXT", default=None, help="text to continue; - for stdin")
    p.add_argument(
        "--prompt-file",
        metavar="FILE",
        default=None,
        help="file that holds the prompt; - for stdin; one newline at its end is left off",
    )
    p.add_argument(
        "--max-tokens",
        type=int | None,
        default=None,
        help=f"tokens to generate at most; default {_MAX_TOKENS}, or what fits the model",
    )
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=1.0, help="keep tokens of this probability")
    p.add_argument("--seed", type=int | None, default=None, help="the same seed, the same text")
    p.add_argument("--num-samples", type=int, default=1, help="texts to generate")
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end of text")
    p.add_argument("--show-depth", action="store_true", help="recursion count of every token")
    p.add_argument("--json", action="store_true", help="one JSON object for each text")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return p.parse_args(args)


def open_model(path: str, device: str) -> tuple[MoRModel, Tokenizer]:
    """The model and the tokenizer of a checkpoint or of a run's newest checkpoint.

    Raises:
        CheckpointError: there is no whole model.
        DataError: there is no tokenizer beside it.
        ConfigError: no such device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r} is unknown: use auto, cpu or cuda.")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device='cuda': torch sees no GPU here; use --device cpu.")
    folder = resolve(path)
    chosen = "cuda" if has_gpu and device != "cpu" else "cpu"
    return load(folder, device=chosen), Tokenizer.load(folder)


def _prompt(options: Any) -> str:
    given = [
        value for value in (options.stdin, options.prompt, options.prompt_file) if value is not None
    ]
    if len(given) > 1:
        raise ConfigError("more than one prompt: give --prompt, --prompt-file or -, not several.")
    if not given:
        return ""
    if given[0] != "-" and options.prompt is not None:
        return options.prompt
    try:
        data = sys.stdin.buffer.read() if given[0] == "-" else Path(given[0]).read_bytes()
    except OSError as error:
        raise DataError(f"{given[0]}: the prompt cannot be read ({error.strerror}).") from error
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{given[0]}: the prompt is not UTF-8 text (byte {error.start}): convert it."
        ) from error


def _params(options: Any, max_tokens: int, stop: tuple[int, ...]) -> list[SamplingParams]:
    if options.num_samples < 1:
        raise ConfigError(f"--num-samples={options.num_samples} must be at least 1.")
    if options.num_samples > 1 and options.temperature == 0:
        raise ConfigError(
            f"--num-samples={options.num_samples} with --temperature=0 would give one text "
            "several times: choose a temperature above 0."
        )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed={options.seed} must be 0 or more, and below 2**63.")
    return [
        SamplingParams(
            max_tokens=max_tokens if options.max_tokens is None else options.max_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            seed=None if options.seed is None else options.seed + number,
            stop_token_ids=stop,
        )
        for number in range(options.num_samples)
    ]


class PieceStream:
    """The text of tokens as they come, never half a character; see `Tokenizer.pieces`."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int]) -> None:
        """Starts after the tokens `before`, whose text is whole."""
        self._tokenizer = tokenizer
        # Some decoders treat a first token differently, so new text is told from a difference.
        self._context = list(before[-4:])  # a character has at most four bytes
        self._pending: list[int] = []
        self._known = tokenizer.decode(self._context)

    def feed(self, token: int) -> str:
        """The text that is whole with this token; "" inside a character."""
        self._pending.append(token)
        text = self._tokenizer.decode([*self._context, *self._pending])
        if text.endswith(_REPLACEMENT):
            return ""
        piece = text[len(self._known) :]
        self._context = self._pending
        self._pending = []
        self._known = self._tokenizer.decode(self._context)
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come, broken characters as U+FFFD."""
        text = self._tokenizer.decode([*self._context, *self._pending])
        self._pending = []
        return text[len(self._known) :]


def completion_text(tokenizer: Tokenizer, completion: Completion) -> str:
    """The text of the generated tokens, without the one that ended it."""
    stream = PieceStream(tokenizer, completion.prompt_token_ids)
    stopped = completion.finish_reason == "stop"
    tokens = completion.token_ids[:-1] if stopped else completion.token_ids
    return "".join([*map(stream.feed, tokens), stream.flush()])


def completion_dict(tokenizer: Tokenizer, completion: Completion) -> dict[str, Any]:
    """A completion as plain data."""
    return {
        "text": completion_text(tokenizer, completion),
        "prompt_token_ids": completion.prompt_token_ids,
        "token_ids": completion.token_ids,
        "recursion_counts": completion.recursion_counts,
        "prompt_recursion_counts": completion.prompt_recursion_counts,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }


class _Writer:
    """Writes the prompt and then each token's text as soon as it is there."""

    def __init__(
        self,
        screen: Console,
        model: MoRModel,
        tokenizer: Tokenizer,
        prompt_ids: list[int],
        show_depth: bool,
        params: SamplingParams,
    ) -> None:
        self._screen, self._model, self._tokenizer = screen, model, tokenizer
        self._prompt_ids, self._stop = prompt_ids, params.stop_token_ids
        self._num_recursions = model.config.num_recursions
        self._coloured = (
            show_depth and screen.is_terminal and self._num_recursions <= MAX_RECURSIONS
        )
        self._stream: PieceStream | None = None
        self._last_count = 1

    def on_token(self, number: int, token: int, count: int) -> None:
        """Called by `generate`; the first token shows that the prompt was accepted."""
        if self._stream is None:
            self._write_prompt()
            self._stream = PieceStream(self._tokenizer, self._prompt_ids)
        if token not in self._stop:
            self._last_count = count
            self._write(self._stream.feed(token), count)

    def end(self) -> None:
        """Write what is left, and end the line."""
        if self._stream is not None:
            self._write(self._stream.flush(), self._last_count)
        self._screen.print()

    def _write_prompt(self) -> None:
        if self._prompt_ids == [self._tokenizer.eos_id]:
            return
        pieces = self._tokenizer.pieces(self._prompt_ids)
        counts = [1] * len(pieces)
        if self._coloured:
            counts = recursion_counts(self._model, self._prompt_ids)
        for piece, count in zip(pieces, counts, strict=True):
            self._write(piece, count, "" if self._coloured else "dim")

    def _write(self, piece: str, count: int, style: str = "") -> None:
        if not piece:
            return
        if not self._screen.is_terminal:
            self._screen.file.write(piece)
            self._screen.file.flush()
            return
        recursions = self._num_recursions if self._coloured else 1
        text = coloured_text([piece], [max(1, count) if self._coloured else 1], recursions)
        self._screen.print(text, end="", style=style, soft_wrap=True)


def _print_depths(screen: Console, model: MoRModel, completion: Completion) -> None:
    """Legend or plain counts, the histogram and the means."""
    num_recursions = model.config.num_recursions
    generated, prompt = completion.recursion_counts, completion.prompt_recursion_counts
    screen.print()
    if screen.is_terminal and num_recursions <= MAX_RECURSIONS:
        screen.print(depth_legend(num_recursions))
    else:
        screen.print(f"recursions of the prompt's tokens: {_joined(prompt)}")
        screen.print(f"recursions of the new tokens: {_joined(generated)}")
    histogram = depth_histogram(generated, num_recursions)
    skip_none = histogram[0] == 0
    rows = [
        (
            str(count),
            f"{round(share * len(generated))}",
            f"{share:.1%}",
            "#" * round(share * _BAR),
        )
        for count, share in enumerate(histogram)
        if count or not skip_none
    ]
    print_table(screen, ("recursions", "new tokens", "share", ""), rows, left=(0, 3))
    before = mean_recursions(depth_histogram(prompt, num_recursions))
    screen.print(
        f"mean recursions: {mean_recursions(histogram):.2f} of {num_recursions} for "
        f"{len(generated)} new tokens, {before:.2f} for {len(prompt)} of the prompt."
    )


def _joined(counts: Sequence[int]) -> str:
    return " ".join(map(str, counts))
