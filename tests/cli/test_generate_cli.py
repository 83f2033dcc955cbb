"""`mor generate`: the reference generator's text, streamed, with depths, as JSON."""

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Mor, TinyRun, one_sentence
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from mor import SamplingParams, Tokenizer, generate, load
from mor.cli import generate as cli
from mor.io.detokenizer import IncrementalDetokenizer
from mor.terminal.color import colored_text

KEYS = {
    *("text", "prompt_token_ids", "token_ids", "recursion_counts", "prompt_recursion_counts"),
    *("logprobs", "finish_reason"),
}


def as_json(mor: Mor, *args: object) -> list[dict[str, Any]]:
    called = mor("generate", *args, "--json")
    assert (called.status, called.err) == (0, "")
    return [json.loads(line) for line in called.out.splitlines()]


def test_text_and_json_are_the_reference_generators(mor: Mor, tiny: TinyRun) -> None:
    model, tokenizer = load(tiny.run), Tokenizer.load(tiny.corpus)
    prompt = tokenizer.encode("def 数学")
    (expected,) = generate(model, [prompt], SamplingParams(max_tokens=12))
    text = tokenizer.decode([*prompt, *expected.token_ids])

    args = (tiny.run, "--prompt", "def 数学", "--max-tokens", 12, "--ignore-eos")
    assert mor("generate", *args) == (0, text + "\n", "")
    (found,) = as_json(mor, *args)
    assert set(found) == KEYS
    assert "def 数学" + found["text"] == text
    assert found["prompt_token_ids"] == prompt
    assert found["token_ids"] == expected.token_ids
    assert found["recursion_counts"] == expected.recursion_counts
    assert found["prompt_recursion_counts"] == expected.prompt_recursion_counts
    assert found["logprobs"] == pytest.approx(expected.logprobs)
    assert found["finish_reason"] == "length"


def test_prompts_from_everywhere_are_the_same(
    mor: Mor, tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("while 🙂 in\n", encoding="utf-8")
    (given,) = as_json(mor, tiny.run, "--prompt", "while 🙂 in", "--max-tokens", 4)
    assert as_json(mor, tiny.run, "--prompt-file", file, "--max-tokens", 4) == [given]
    for args in (["-"], ["--prompt", "-"], ["--prompt-file", "-"]):
        stdin = io.TextIOWrapper(io.BytesIO(file.read_bytes()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", stdin)
        assert as_json(mor, tiny.run, *args, "--max-tokens", 4) == [given], args


def test_without_a_prompt_the_end_of_text_comes_before(mor: Mor, tiny: TinyRun) -> None:
    eos = Tokenizer.load(tiny.corpus).eos_id
    (found,) = as_json(mor, tiny.run, "--max-tokens", 4, "--ignore-eos")
    assert found["prompt_token_ids"] == [eos]
    called = mor("generate", tiny.run, "--max-tokens", 4, "--ignore-eos")
    assert called.out == found["text"] + "\n"


def test_the_end_of_text_stops_unless_ignored(mor: Mor, zero_head: Path) -> None:
    (found,) = as_json(mor, zero_head, "--prompt", "def")
    assert (found["token_ids"], found["text"], found["finish_reason"]) == ([0], "", "stop")
    assert mor("generate", zero_head, "--prompt", "def").out == "def\n"
    (found,) = as_json(mor, zero_head, "--prompt", "def", "--ignore-eos", "--max-tokens", 3)
    assert (found["token_ids"], found["finish_reason"]) == ([0, 0, 0], "length")
    assert found["text"] == "<|endoftext|>" * 3


def test_samples_differ_and_seeds_repeat_them(mor: Mor, tiny: TinyRun) -> None:
    args = (tiny.run, "--temperature", 1, "--n", 3, "--max-tokens", 6, "--ignore-eos")
    first, again = (as_json(mor, *args, "--seed", 5) for _ in range(2))
    other = as_json(mor, *args, "--seed", 50)
    texts = [sample["text"] for sample in first]
    assert len(set(texts)) == 3
    assert [sample["token_ids"] for sample in again] == [sample["token_ids"] for sample in first]
    assert [sample["text"] for sample in other] != texts
    printed = mor("generate", *args, "--seed", 5).out
    assert printed == "".join(f"-- {i} of 3\n{text}\n" for i, text in enumerate(texts, start=1))


def test_top_k_of_one_is_greedy(mor: Mor, tiny: TinyRun) -> None:
    args = (tiny.run, "--prompt", "self", "--max-tokens", 8)
    (greedy,) = as_json(mor, *args)
    (found,) = as_json(mor, *args, "--temperature", 2, "--top-k", 1)
    assert found["token_ids"] == greedy["token_ids"]
    (found,) = as_json(mor, *args, "--temperature", 2, "--top-p", 1e-9)
    assert found["token_ids"] == greedy["token_ids"]


def test_every_sampling_option_reaches_the_generator(mor: Mor, tiny: TinyRun) -> None:
    model, tokenizer = load(tiny.run), Tokenizer.load(tiny.corpus)
    fields: dict[str, Any] = {
        "max_tokens": 10,
        "min_tokens": 5,
        "temperature": 1.5,
        "top_k": 90,
        "top_p": 0.97,
        "min_p": 0.001,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "seed": 3,
        "logprobs": 2,
        "max_recursions": 1,
    }
    params = SamplingParams(**fields, stop_token_ids=(1, 2), ignore_eos=True, prompt_logprobs=True)
    (expected,) = generate(model, [tokenizer.encode("def self")], params)
    options = [x for k, v in fields.items() for x in (f"--{k.replace('_', '-')}", v)]
    more = ("--stop-token-ids", 1, 2, "--ignore-eos", "--prompt-logprobs")
    (found,) = as_json(mor, tiny.run, "--prompt", "def self", *options, *more)
    assert set(found) == KEYS | {"top_logprobs", "prompt_logprobs"}
    assert found["token_ids"] == expected.token_ids
    assert found["recursion_counts"] == expected.recursion_counts == [1] * len(found["token_ids"])
    assert found["logprobs"] == pytest.approx(expected.logprobs)
    assert found["prompt_logprobs"] == [None, *map(pytest.approx, expected.prompt_logprobs[1:])]
    for top, truth in zip(found["top_logprobs"], expected.top_logprobs, strict=True):
        assert {int(token): pytest.approx(logprob) for token, logprob in top.items()} == truth


def test_every_token_can_be_made_to_take_all_recursions(mor: Mor, scattered: Path) -> None:
    args = (scattered, "--prompt", "def", "--max-tokens", 5, "--ignore-eos")
    for recursions in (1, 2, 3):
        (found,) = as_json(
            mor, *args, "--min-recursions", recursions, "--max-recursions", recursions
        )
        assert set(found["recursion_counts"] + found["prompt_recursion_counts"]) == {recursions}


def test_depths_in_a_pipe_are_plain_lines(mor: Mor, scattered: Path) -> None:
    args = (scattered, "--prompt", "def value", "--max-tokens", 9, "--ignore-eos")
    args = (*args, "--temperature", 1, "--seed", 2)
    (found,) = as_json(mor, *args)
    out = mor("generate", *args, "--show-depth").out
    assert out.startswith("def value" + found["text"] + "\n")
    assert "\x1b" not in out
    new, before = found["recursion_counts"], found["prompt_recursion_counts"]
    assert len(set(new)) > 1
    assert f"new tokens: {' '.join(map(str, new))}\n" in out
    assert f"prompt's tokens: {' '.join(map(str, before))}\n" in out
    for count in (1, 2, 3):
        number = new.count(count)
        assert re.search(rf"^{count} +{number} +{number / 9:.1%}", out, re.MULTILINE)
    assert f"mean recursions: {sum(new) / 9:.2f} of 3 for 9 new tokens" in out


def test_depths_on_a_terminal_are_colors(
    mor: Mor, scattered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = (scattered, "--prompt", "def value 🙂", "--max-tokens", 40, "--ignore-eos")
    args = (*args, "--temperature", 1, "--seed", 4)
    (found,) = as_json(mor, *args)
    tokenizer = Tokenizer.load(scattered)
    counts = found["prompt_recursion_counts"] + found["recursion_counts"]
    pieces = tokenizer.pieces([*found["prompt_token_ids"], *found["token_ids"]])
    expected = colored_text(pieces, counts, 3).plain
    assert set(counts) == {1, 2, 3}
    assert "\t" not in expected, "which the terminal would expand"

    def shown(*more: str) -> str:
        out = io.StringIO()
        screen = Console(file=out, width=5, force_terminal=True, color_system="truecolor")
        monkeypatch.setattr(cli, "console", lambda: screen)
        assert mor("generate", *args, *more).status == 0
        return out.getvalue()

    codes = re.compile(r"\x1b\[[0-9;]*m")
    plain, colored = shown(), shown("--show-depth")
    assert codes.sub("", plain) == expected + "\n"
    assert codes.sub("", colored).startswith(expected + "\n\nrecur")
    assert "mean\nrecur\nsions" in re.sub(r" +\n", "\n", codes.sub("", colored))
    for count, cue in ((2, "\x1b[4;"), (3, "\x1b[1;")):  # underlined, bold
        deep = [p for p, c in zip(pieces, counts, strict=True) if c == count and p]
        text = colored.partition("\n\nrecur")[0]
        assert text.count(cue) == len(deep)
        assert cue not in plain


@pytest.mark.parametrize(
    ("options", "may_be_deeper"),
    [
        (("--min-recursions", 2), True),
        (("--max-recursions", 2), False),
        (("--min-recursions", 2, "--max-recursions", 2), False),
    ],
)
def test_colors_of_the_prompt_keep_to_the_limit(
    mor: Mor,
    scattered: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    may_be_deeper: bool,
) -> None:
    args = (scattered, "--prompt", "def value import", "--max-tokens", 20, "--ignore-eos", *options)
    (found,) = as_json(mor, *args)
    counts = found["prompt_recursion_counts"] + found["recursion_counts"]
    pieces = Tokenizer.load(scattered).pieces([*found["prompt_token_ids"], *found["token_ids"]])
    out = io.StringIO()
    screen = Console(file=out, width=99, force_terminal=True, color_system="truecolor")
    monkeypatch.setattr(cli, "console", lambda: screen)
    assert mor("generate", *args, "--show-depth").status == 0
    text = out.getvalue().partition("\n\nrecur")[0]
    underlined = [piece for piece, c in zip(pieces, counts, strict=True) if c == 2 and piece]
    assert text.count("\x1b[4;") == len(underlined) > 0
    bold = [piece for piece, c in zip(pieces, counts, strict=True) if c == 3 and piece]
    assert text.count("\x1b[1;") == len(bold)
    assert bool(bold) == may_be_deeper


def test_the_prompt_and_the_limit_decide_the_default_length(mor: Mor, tiny: TinyRun) -> None:
    (found,) = as_json(mor, tiny.run, "--prompt", "def", "--ignore-eos")
    assert len(found["prompt_token_ids"]) + len(found["token_ids"]) == 64


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--temperature", -1], ["temperature", "-1"]),
        (["--top-p", 0], ["top_p", "(0, 1]"]),
        (["--max-tokens", 0], ["max_tokens=0", ">= 1"]),
        (["--n", 0], ["n=0", "1..1024"]),
        (["--n", 2], ["n=2", "temperature=0", "above 0"]),
        (["--seed", -1], ["seed=-1", "an integer in 0.."]),
        (["--min-recursions", 3], ["min_recursions=3", "1..2"]),
        (["--min-recursions", 2, "--max-recursions", 1], ["max_recursions=1", "min_recursions=2"]),
        (["--logprobs", 21, "--json"], ["logprobs=21", "0..20"]),
        (["--logprobs", 2], ["--logprobs", "--json"]),
        (["--min-tokens", 3, "--max-tokens", 2], ["min_tokens=3", "max_tokens=2"]),
        (["--prompt", "a", "--prompt-file", "b"], ["--prompt", "--prompt-file"]),
        (["--prompt-file", "no-such-file"], ["no-such-file"]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--prompt", "def " * 100], ["the prompt", "64"]),
        (["--prompt", "def", "--max-tokens", 64], ["max_tokens=64", "64"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    mor: Mor, tiny: TinyRun, options: list[object], words: list[str]
) -> None:
    message = one_sentence(mor("generate", tiny.run, *options), status=1)
    assert all(word in message for word in words)


def test_a_prompt_that_is_no_text(mor: Mor, tiny: TinyRun, tmp_path: Path) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes("café".encode("latin-1"))
    message = one_sentence(mor("generate", tiny.run, "--prompt-file", file), status=1)
    assert "latin.txt" in message
    assert "UTF-8" in message
    assert "Unicode" in one_sentence(mor("generate", tiny.run, "--prompt", "\udc80"), status=1)


def test_a_checkpoint_without_a_tokenizer(mor: Mor, zero_head: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(zero_head, bare)
    (bare / "tokenizer.json").unlink()
    assert "tokenizer.json" in one_sentence(mor("generate", bare), status=1)


@given(before=st.text(max_size=6), text=st.text(max_size=30), cut=st.integers(0, 60))
def test_streamed_pieces_are_those_of_the_tokenizer(
    tiny: TinyRun, before: str, text: str, cut: int
) -> None:
    tokenizer = Tokenizer.load(tiny.corpus)
    prompt, ids = tokenizer.encode(before), tokenizer.encode(text)[:cut]
    stream = IncrementalDetokenizer(tokenizer, prompt)
    pieces = [stream.push(token) for token in ids]
    rest = stream.flush()
    assert "".join([before, *pieces, rest]) == tokenizer.decode([*prompt, *ids])
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    if pieces:
        whole = tokenizer.pieces([*prompt, *ids])[len(prompt) :]
        assert [*pieces[:-1], pieces[-1] + rest] == whole
