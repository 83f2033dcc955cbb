"""`mor generate`: continue a prompt, colored by recursion count."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from mor.cli.options.parser import Parser, parser
from mor.engine.config import EngineConfig
from mor.engine.llm import LLM
from mor.engine.request import TokenOutput
from mor.errors import ConfigError, DataError
from mor.eval.depth import depth_histogram, mean_recursions, recursion_counts
from mor.io.checkpoint import load, resolve
from mor.io.tokenizer import Tokenizer
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel
from mor.report.palette import MAX_RECURSIONS
from mor.terminal.color import colored_text, depth_legend
from mor.terminal.console import console, err_console
from mor.terminal.table import print_table

HELP = "Continue a prompt; without one, start a text from nothing."

EXAMPLES = (
    "mor generate runs/smoke --prompt 'def main' --show-depth",
    "mor generate runs/smoke --prompt 'import' --temperature 0.8 --top-p 0.95 --num-samples 3",
    "git diff | mor generate runs/smoke --max-tokens 20 --json -",
)

_MAX_TOKENS = 64
_SAMPLING = (  # options that are fields of SamplingParams under the same name
    *("min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "ignore_eos", "logprobs", "prompt_logprobs"),
    *("min_recursions", "max_recursions"),
)
_BAR = 30  # characters of the histogram's longest bar
_MAX_SEQUENCES = 64


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    model, tokenizer = open_model(options.model, options.device)
    prompt = _prompt(options)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    room = model.config.max_position_embeddings - len(prompt_ids)
    params = _params(options, max(1, min(_MAX_TOKENS, room)))
    config = EngineConfig(
        max_num_seqs=min(_MAX_SEQUENCES, len(params)),
        dtype=options.dtype,
        quantization=options.quantization,
        kv_cache_memory_bytes=options.kv_cache_memory_bytes,
    )
    with err_console().status("starting the engine (once, compiling its kernels takes a while)"):
        llm = LLM(model, config, tokenizer=tokenizer)
    if options.json:
        for completion in llm.generate([prompt_ids] * len(params), params):
            print(json.dumps(completion_dict(completion)))
        return 0
    screen = console()
    for number, one in enumerate(params, start=1):
        if len(params) > 1:
            screen.print(f"-- {number} of {len(params)}", style="dim", markup=False)
        writer = _Writer(screen, model, tokenizer, prompt_ids, options.show_depth, one)
        completion: Completion | None = None
        for event in llm.stream(prompt_ids, one):
            writer.write(event)
            completion = event.completions[0] if event.completions else None
        writer.end()
        if options.show_depth and completion is not None:
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
    _add_sampling(p)
    p.add_argument("--show-depth", action="store_true", help="recursion count of every token")
    p.add_argument("--json", action="store_true", help="one JSON object for each text")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda")
    p.add_argument("--dtype", default=None, help="of the weights: float32, bfloat16, ..")
    p.add_argument("--quantization", default=None, help="int8: weights and inputs, on a CPU")
    p.add_argument(
        "--kv-cache-memory-bytes", type=int | None, default=None, help="bytes for keys and values"
    )
    return p.parse_args(args)


def _add_sampling(p: Parser) -> None:
    """The options that become `SamplingParams`."""
    p.add_argument("--min-tokens", type=int, default=0, help="no end of text before so many tokens")
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    p.add_argument("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0 keeps all")
    p.add_argument("--top-p", type=float, default=1.0, help="keep tokens of this probability")
    p.add_argument(
        "--min-p", type=float, default=0.0, help="drop tokens below this share of the likeliest"
    )
    p.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 avoids tokens seen so far"
    )
    p.add_argument(
        "--presence-penalty", type=float, default=0.0, help="off the logits of tokens in the output"
    )
    p.add_argument(
        "--frequency-penalty", type=float, default=0.0, help="the same for each time they are there"
    )
    p.add_argument("--seed", type=int | None, default=None, help="the same seed, the same text")
    p.add_argument("--num-samples", type=int, default=1, help="texts to generate")
    p.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="end before one of these texts"
    )
    p.add_argument(
        "--stop-token-ids", type=int, nargs="+", default=[], metavar="ID", help="end after these"
    )
    p.add_argument("--ignore-eos", action="store_true", help="go on after the end of text")
    p.add_argument(
        "--logprobs",
        type=int | None,
        default=None,
        help="with --json: log-probabilities of so many of the likeliest tokens at each place",
    )
    p.add_argument(
        "--prompt-logprobs", action="store_true", help="with --json: those of the prompt's tokens"
    )
    p.add_argument(
        "--min-recursions", type=int | None, default=None, help="passes that every token takes"
    )
    p.add_argument(
        "--max-recursions", type=int | None, default=None, help="passes that no token exceeds"
    )


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


def _params(options: Any, max_tokens: int) -> list[SamplingParams]:
    if options.num_samples < 1:
        raise ConfigError(f"--num-samples={options.num_samples} must be at least 1.")
    if options.num_samples > 1 and options.temperature == 0:
        raise ConfigError(
            f"--num-samples={options.num_samples} with --temperature=0 would give one text "
            "several times: choose a temperature above 0."
        )
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed={options.seed} must be 0 or more, and below 2**63.")
    if not options.json and (options.logprobs is not None or options.prompt_logprobs):
        raise ConfigError("--logprobs and --prompt-logprobs show nothing without --json: add it.")
    given = {name: getattr(options, name) for name in _SAMPLING}
    return [
        SamplingParams(
            **given,
            max_tokens=max_tokens if options.max_tokens is None else options.max_tokens,
            seed=None if options.seed is None else options.seed + number,
            stop=tuple(options.stop),
            stop_token_ids=tuple(options.stop_token_ids),
        )
        for number in range(options.num_samples)
    ]


def completion_dict(completion: Completion) -> dict[str, Any]:
    """A completion as plain data, with the log-probabilities that were asked for."""
    values = {
        "text": completion.text,
        "prompt_token_ids": completion.prompt_token_ids,
        "token_ids": completion.token_ids,
        "recursion_counts": completion.recursion_counts,
        "prompt_recursion_counts": completion.prompt_recursion_counts,
        "logprobs": completion.logprobs,
        "finish_reason": completion.finish_reason,
    }
    asked = ("top_logprobs", "prompt_logprobs")
    return values | {name: value for name in asked if (value := getattr(completion, name))}


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
        self._prompt_ids = prompt_ids
        self._num_recursions = model.config.num_recursions
        self._range = params.recursion_range(self._num_recursions)
        self._colored = show_depth and screen.is_terminal and self._num_recursions <= MAX_RECURSIONS
        self._begun = False

    def write(self, event: TokenOutput) -> None:
        """A token; the first one shows that the prompt was accepted."""
        if not self._begun:
            self._write_prompt()
            self._begun = True
        self._write(event.text, event.recursion_count)

    def end(self) -> None:
        """End the line."""
        self._screen.print()

    def _write_prompt(self) -> None:
        if self._prompt_ids == [self._tokenizer.eos_id]:
            return
        pieces = self._tokenizer.pieces(self._prompt_ids)
        counts = [1] * len(pieces)
        if self._colored:
            minimum, maximum = self._range  # a limit changes no decision above it
            free = recursion_counts(self._model, self._prompt_ids)
            counts = [max(minimum, min(count, maximum)) for count in free]
        for piece, count in zip(pieces, counts, strict=True):
            self._write(piece, count, "" if self._colored else "dim")

    def _write(self, piece: str, count: int, style: str = "") -> None:
        if not piece:
            return
        if not self._screen.is_terminal:
            self._screen.file.write(piece)
            self._screen.file.flush()
            return
        recursions = self._num_recursions if self._colored else 1
        text = colored_text([piece], [max(1, count) if self._colored else 1], recursions)
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
