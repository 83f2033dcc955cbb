"""`mor chat`: a talk over the API and with a model in the process, driven through a pipe."""

import asyncio
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import MAIN, TinyRun, environment, invoke
from rich.console import Console

from fake_server import TOKENS, Fake, serving
from mor import LLM, SamplingParams
from mor.cli.chat_backends import ChatMessage, join_text, pieces
from mor.engine.request import TokenOutput
from mor.terminal.color import colored_text

SENTENCE = "The token goes deeper."
Talk = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def fake() -> Iterator[Fake]:
    with serving(Fake()) as server:
        yield server


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Talk:
    """Call `mor chat` with lines on standard input; status, lines of stdout, words of stderr."""

    def call(lines: list[str], *args: object) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        status = invoke("chat", *args)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return status, captured.out.splitlines(), " ".join(captured.err.split())

    return call


# -- behind a server --------------------------------------------------------------------------


def test_turns_go_back_and_forth(talk: Talk, fake: Fake) -> None:
    status, out, err = talk(["Hello", "", "And now?"], fake.url, "--system", "Be brief.",
                            "--seed", 7, "--top-p", 0.9, "--max-tokens", 6)  # fmt: skip
    assert (status, err) == (0, "")
    assert out == [SENTENCE, SENTENCE]
    (first, second) = [body for path, body in fake.asked if path == "/v1/chat/completions"]
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    assert first["messages"] == turns
    assert second["messages"] == [
        *turns,
        {"role": "assistant", "content": SENTENCE},
        {"role": "user", "content": "And now?"},
    ]
    assert (first["temperature"], first["top_p"], first["max_tokens"]) == (0.7, 0.9, 6)
    assert (first["seed"], second["seed"]) == (7, 8)
    assert "max_recursions" not in first


def test_commands_turn_the_dials(talk: Talk, fake: Fake) -> None:
    lines = [
        "/max-recursions 2",
        "/temperature 0",
        "one",
        "/max-recursions",
        "/reset",
        "two",
        "/quit",
        "three",
    ]
    status, out, err = talk(lines, f"{fake.url}/v1", "--max-recursions", 1, "--max-tokens", 6)
    assert status == 0
    assert len(out) == 2
    (one, two) = [body for path, body in fake.asked if path == "/v1/chat/completions"]
    assert (one["max_recursions"], one["temperature"]) == (2, 0)
    assert "max_recursions" not in two
    assert [turn["content"] for turn in two["messages"]] == ["two"]
    assert err == (
        "at most 2 recursions. temperature 0. as the router decides. forgotten."
    )  # and nothing about /quit


def test_a_wrong_command_does_not_end_the_talk(talk: Talk, fake: Fake) -> None:
    lines = [
        "/rest",
        "/max-recursions 4",
        "/max-recursions x",
        "/temperature hot",
        "/temperature -1",
        "/help",
        "go",
    ]
    status, out, err = talk(lines, fake.url, "--max-tokens", 6)
    assert (status, out) == (0, [SENTENCE])
    assert "/rest is no command: did you mean 'reset'?" in err
    assert err.count("must be a number from 1 to 3.") == 2
    assert err.count("must be a finite number >= 0.") == 2
    assert "/temperature X" in err


def test_without_a_template_the_text_goes_on(talk: Talk) -> None:
    with serving(Fake(has_chat=False)) as fake:
        status, out, err = talk(["Once", "Twice"], fake.url, "--max-tokens", 2)
    assert (status, out) == (0, ["The token", "The token"])
    assert "fake has no chat template" in err
    bodies = [body for path, body in fake.asked if path == "/v1/completions"]
    assert [body["prompt"] for body in bodies] == ["Once", "Once\nThe token\nTwice"]


def test_an_error_of_the_server_is_told_and_the_talk_goes_on(talk: Talk) -> None:
    with serving(Fake(break_after=1)) as fake:
        status, _, err = talk(["a", "b"], fake.url)
    assert status == 0
    assert err.count("error: the engine fell over.") == 2
    assert len(fake.asked) == 3


def test_the_key_comes_from_the_environment(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Fake(api_key="sesame")) as fake:
        status, _, err = talk(["a"], fake.url)
        assert status == 1
        assert "401: wrong API key." in err
        monkeypatch.setenv("MOR_API_KEY", "sesame")
        assert talk(["a"], fake.url, "--max-tokens", 6)[:2] == (0, [SENTENCE])


def test_ctrl_c_ends_the_answer_only() -> None:
    with serving(Fake(delay_s=0.02)) as fake:
        program = subprocess.Popen(
            [sys.executable, "-c", MAIN, "chat", fake.url, "--max-tokens", "100000"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            env=environment(),
        )
        assert program.stdin is not None
        assert program.stdout is not None
        program.stdin.write("go on\n")
        program.stdin.flush()
        assert program.stdout.read(len("The token goes")) == "The token goes"
        program.send_signal(signal.SIGINT)
        _until(lambda: fake.aborted == ["/v1/chat/completions"])
        fake.delay_s = 0.0
        _, err = program.communicate("/reset\n", timeout=60)
    assert program.returncode == 0, err
    assert err == "forgotten.\n"


def test_ctrl_c_while_the_loop_wakes_the_reader(
    talk: Talk,
    fake: Fake,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    wake, left = asyncio.Future.set_result, [20]

    def interrupted(reader: Any) -> None:
        waiter, reader._waiter = reader._waiter, None
        if waiter is not None and not waiter.cancelled():
            left[0] -= 1
            if left[0] == 0:  # in the middle of the answer
                signal.raise_signal(signal.SIGINT)
            wake(waiter, None)

    monkeypatch.setattr(asyncio.StreamReader, "_wakeup_waiter", interrupted)
    fake.delay_s = 0.002
    status, out, err = talk(["go on", "/reset"], fake.url, "--max-tokens", 1000)
    assert (status, err, caplog.text) == (0, "forgotten.", "")
    assert left[0] <= 0
    assert 0 < len(out[0]) < 1000


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- in the process ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(scattered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with three recursions and a chat template."""
    folder = tmp_path_factory.mktemp("talker") / "model"
    shutil.copytree(scattered, folder)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}you:"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


def test_a_model_without_a_template_continues(talk: Talk, tiny: TinyRun) -> None:
    lines = ["/temperature 0", "def", "/reset", "def"]
    status, out, err = talk(lines, tiny.run, "--max-tokens", 4)
    assert status == 0
    assert "has no chat template" in err
    assert len(out) >= 2
    half = len(out) // 2
    assert out[:half] == out[half:]  # greedy, and the talk was forgotten


def test_a_model_with_a_template_is_told_who_speaks(
    talk: Talk, talker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    stream = LLM.stream

    def spy(llm: LLM, prompt: list[int], params: SamplingParams) -> Generator[TokenOutput]:
        assert llm.tokenizer is not None
        seen.append(llm.tokenizer.decode(prompt))
        return stream(llm, prompt, params)

    monkeypatch.setattr(LLM, "stream", spy)
    lines = ["/max-recursions 1", "print", "/reset", "self"]
    status, _, err = talk(lines, talker, "--max-tokens", 3, "--system", "def")
    assert status == 0
    assert "template" not in err
    assert seen == ["system: def\nuser: print\nyou:", "system: def\nuser: self\nyou:"]


def test_a_talk_that_is_too_long_says_so(talk: Talk, tiny: TinyRun) -> None:
    status, _, err = talk(["print self value " * 40, "/reset", "def"], tiny.run)
    assert status == 0
    assert "start again with /reset" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("runs/none",), "runs/none"),
        (("http://",), "is no address"),
        (("http://127.0.0.1:9", "--dtype", "float32"), "--dtype is for a folder, not a URL"),
        (("runs/none", "--api-key", "k"), "--api-key is for a URL, not a folder"),
        (("http://127.0.0.1:9", "--max-tokens", "0"), "max_tokens=0 must be an integer >= 1"),
    ],
)
def test_what_is_wrong_is_one_sentence(talk: Talk, args: tuple[str, ...], message: str) -> None:
    status, out, err = talk([], *args)
    assert (status, out) == (1, [])
    assert message in err


@pytest.mark.parametrize(
    "args", [("--max-recursions", 4), ("--temperature", -1), ("--model", "fak")]
)
def test_an_option_that_the_model_cannot_follow(
    talk: Talk, fake: Fake, args: tuple[object, ...]
) -> None:
    status, out, err = talk(["a"], fake.url, *args)
    assert (status, out) == (1, [])
    assert "must be" in err or "did you mean 'fake'?" in err


def test_tokens_have_the_colors_of_their_depth(
    talk: Talk, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminal() -> Console:
        return Console(
            force_terminal=True, color_system="truecolor", highlight=False, file=io.StringIO()
        )

    screen, expected = terminal(), terminal()
    monkeypatch.setattr("mor.cli.chat.console", lambda: screen)
    assert talk(["go"], fake.url, "--max-tokens", 6)[0] == 0
    for piece, count in zip(TOKENS, (1, 2, 3, 1, 2, 3), strict=True):
        expected.print(colored_text([piece], [count], 3), end="")
    shown = screen.file.getvalue()
    first, about = shown.splitlines()
    assert first == expected.file.getvalue()
    assert "6 tokens, " in about
    assert "2.00 of 3 recursions on average" in about


# -- parts ------------------------------------------------------------------------------------


def test_tokens_that_came_together_are_told_apart() -> None:
    chat = {
        "delta": {"content": "ab"},
        "recursion_counts": [1, 3],
        "logprobs": {"content": [{"token": "a"}, {"token": "b"}]},
    }
    assert pieces(chat) == [("a", 1), ("b", 3)]
    assert pieces({**chat, "logprobs": None}) == [("ab", 3)]
    assert pieces({"text": "é", "recursion_counts": [2], "logprobs": {"tokens": ["bytes"]}}) == [
        ("é", 2)
    ]
    assert pieces({"delta": {"role": "assistant"}}) == []
    assert pieces({"text": "x"}) == [("x", 1)]


def test_a_plain_talk_is_one_text() -> None:
    assert join_text([ChatMessage("system", "a"), ChatMessage("user", "b")]) == "a\nb"
