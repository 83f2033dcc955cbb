"""`mor generate`: continue a prompt, colored by recursion count."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mor.cli.options.engine_options import add_engine_options, engine_config
from mor.cli.options.model_options import open_model, start_engine
from mor.cli.options.parser import parser
from mor.cli.options.sampling_options import add_sampling_options, sampling_params
from mor.engine.request import TokenOutput
from mor.errors import ConfigError, DataError
from mor.eval.depth import depth_histogram, mean_recursions
from mor.io.tokenizer import Tokenizer
from mor.model.sampling import Completion, SamplingParams
from mor.model.transformer import MoRModel
from mor.report.palette import MAX_RECURSIONS
from mor.terminal.color import colored_text, depth_legend
from mor.terminal.console import console
from mor.terminal.table import print_table

HELP = "Continue a prompt; without one, start a text from nothing."

EXAMPLES = (
    "mor generate runs/smoke --prompt 'def main' --show-depth",
    "mor generate runs/smoke --prompt 'import' --temperature 0.8 --top-p 0.95 --n 3",
    "git diff | mor generate runs/smoke --max-tokens 20 --json -",
)

_SAMPLING_OPTIONS = (  # all fields of SamplingParams but prompt_logprobs_from, in this order
    *("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "seed", "n", "stop", "stop_token_ids"),
    *("ignore_eos", "logprobs", "prompt_logprobs", "min_recursions", "max_recursions"),
)
_ENGINE_OPTIONS = ("device", "dtype", "quantization", "kv_cache_memory_bytes", "num_threads")
_BAR = 30  # characters of the histogram's longest bar
_MAX_NUM_SEQS = 64


def run(args: Sequence[str]) -> int:
    """Entry point; returns the exit status."""
    options = _parse(args)
    model, tokenizer = open_model(options.model, options.device)
    prompt = _prompt(options)
    prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    room = model.config.max_position_embeddings - len(prompt_ids)
    params = _params(options, max(1, min(SamplingParams.max_tokens, room)))
    config = engine_config(options, max_num_seqs=min(_MAX_NUM_SEQS, len(params)))
    llm = start_engine(model, config, tokenizer)
    if options.json:
        for completion in llm.generate([prompt_ids] * len(params), params):
            print(json.dumps(completion_dict(completion)))
        return 0
    screen = console()
    for number, one in enumerate(params, start=1):
        if len(params) > 1:
            screen.print(f"-- {number} of {len(params)}", style="dim", markup=False)
        writer = _Writer(screen, tokenizer, model.config.num_recursions, options.show_depth)
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
    add_sampling_options(
        p,
        _SAMPLING_OPTIONS,
        helps={
            "max_tokens": f"tokens to generate, at most; default {SamplingParams.max_tokens}, or "
            "what fits the model",
            "logprobs": "with --json: report so many of the likeliest tokens at each place",
            "prompt_logprobs": "with --json: report those of the prompt's tokens",
            "n": "texts to generate; number i, from 0, has the seed SEED + i",
        },
        max_tokens=None,
        stop=[],
        stop_token_ids=[],
    )
    p.add_argument("--show-depth", action="store_true", help="recursion count of every token")
    p.add_argument("--json", action="store_true", help="one JSON object for each text")
    add_engine_options(p, _ENGINE_OPTIONS)
    return p.parse_args(args)


def _prompt(options: Any) -> str:
    """The prompt from the one place that it was given in; empty if there is none."""
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
    """The parameters of each of the n texts, which are requests of their own: each is streamed."""
    if not options.json and (options.logprobs is not None or options.prompt_logprobs):
        raise ConfigError("--logprobs and --prompt-logprobs show nothing without --json: add it.")
    limit = max_tokens if options.max_tokens is None else options.max_tokens
    params = sampling_params(options, max_tokens=limit)
    if params.n > 1 and params.temperature == 0:
        raise ConfigError(
            f"n={params.n} with temperature=0 would give one text several times: choose a "
            "--temperature above 0."
        )
    seeds = [None if params.seed is None else params.seed + i for i in range(params.n)]
    return [replace(params, n=1, seed=seed) for seed in seeds]


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
    """Writes the prompt, and then the text of each token as it comes."""

    def __init__(
        self, screen: Console, tokenizer: Tokenizer, num_recursions: int, show_depth: bool
    ) -> None:
        self._screen, self._tokenizer = screen, tokenizer
        self._num_recursions = num_recursions
        self._colored = show_depth and screen.is_terminal and num_recursions <= MAX_RECURSIONS

    def write(self, event: TokenOutput) -> None:
        """Write a token's text, and before the first one the prompt, which comes with it."""
        if event.prompt is not None:
            self._write_prompt(event.prompt)
        self._write(event.text, event.recursion_count)

    def end(self) -> None:
        """End the line."""
        self._screen.print()

    def _write_prompt(self, prompt: Completion) -> None:
        if prompt.prompt_token_ids == [self._tokenizer.eos_id]:  # stands for an empty prompt
            return
        pieces = self._tokenizer.pieces(prompt.prompt_token_ids)
        for piece, count in zip(pieces, prompt.prompt_recursion_counts, strict=True):
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
    """Print the legend (in a pipe the counts), the histogram and the means."""
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
