"""`mor` itself: verbs, errors of one sentence, pipes, interruptions."""

import io
import subprocess
import sys

import pytest
from cli_helpers import Mor, TinyRun, invoke, one_sentence, start

from mor import __version__
from mor.cli import info
from mor.cli.main import VERBS


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(mor: Mor, args: list[str]) -> None:
    status, out, err = mor(*args)
    assert (status, err) == (0, "")
    for verb, (_, what) in VERBS.items():
        assert f"  {verb:<11}{what}\n" in out


def test_version(mor: Mor) -> None:
    assert mor("--version") == (0, f"mor {__version__}\n", "")


def test_help_imports_no_verb() -> None:
    code = (
        "import sys; from mor.cli.main import main; main(['--help']); "
        "print([m for m in sys.modules if m.startswith(('mor.train', 'mor.eval', 'mor.bench'))"
        " or m in {'mor.demo', 'mor.cli.data', 'mor.cli.info', 'mor.cli.generate'}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", ["data build", "data info", "train", "generate", "eval", "info"])
def test_every_verb_explains_itself_with_examples(mor: Mor, verb: str) -> None:
    status, out, err = mor(*verb.split(), "--help")
    assert (status, err) == (0, "")
    assert f"usage: mor {verb}" in out
    assert "examples:\n  mor " in out or f"examples:\n  git diff | mor {verb}" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("trian", "unknown verb 'trian': did you mean 'train'?"),
        ("genrate model", "unknown verb 'genrate': did you mean 'generate'?"),
        ("data biuld x", "unknown verb 'data biuld': did you mean 'build'?"),
        ("info 360m --contxt 4", "unknown option --contxt: did you mean '--context'?"),
        ("eval run --max-window=4", "unknown option --max-window: did you mean '--max-windows'?"),
        (
            "generate run --temprature 1",
            "unknown option --temprature: did you mean '--temperature'?",
        ),
        ("train c.yaml --stepz 3", "unknown option --stepz: did you mean '--steps'?"),
        ("info 360m 135m", "unexpected argument '135m'."),
        ("generate run --max-tokens many", "--max-tokens='many' must be of type int."),
        ("generate run --top-p most", "--top-p='most' must be of type float."),
        ("generate run --seed a", "--seed='a' must be of type int."),
        ("info 360m --context 1.5", "--context='1.5' must be of type int."),
        ("eval run --calibrate x", "--calibrate='x' must be of type int."),
        ("eval", "the following arguments are required: model"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_status_2(
    mor: Mor, args: str, message: str
) -> None:
    assert one_sentence(mor(*args.split()), status=2) == message


@pytest.mark.parametrize("verb", ["generate", "eval", "info"])
def test_a_missing_model_is_named(mor: Mor, verb: str) -> None:
    message = one_sentence(mor(verb, "no/such/model"), status=1)
    assert "no/such/model" in message
    assert "exist" in message or "No such file" in message


def test_square_brackets_in_an_error_are_only_text(mor: Mor) -> None:
    assert "'[bold]x[/]'" in one_sentence(mor("[bold]x[/]"), status=2)


def test_an_interruption_has_no_traceback(mor: Mor, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert mor("info", "360m") == (130, "", "interrupted.\n")


def test_a_pipe_gets_no_escape_codes(tiny: TinyRun) -> None:
    with start(
        "generate", tiny.run, "--prompt", "def 🙂", "--show-depth", "--ignore-eos"
    ) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("def 🙂")
    assert "\x1b" not in out
    assert "recursions of the new tokens: " in out


def test_a_closed_pipe_is_no_error_to_read_about() -> None:
    with start("info", "360m") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # what `| head` does when it has enough
        err = process.stderr.read()
    assert process.returncode in (1, 141)
    assert err == ""


def test_a_locale_without_a_letter_shows_it_escaped(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    assert invoke("generate", tiny.run, "--prompt", "café", "--max-tokens", 1) == 0
    assert out.getvalue().startswith(b"caf\\xe9")
