"""`mor serve`: options that cannot work are refused before anything is loaded."""

import socket
import sys

import pytest
from cli_helpers import Mor, TinyRun, one_sentence

from mor.engine.llm import LLM


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--api-key", ""), "API key"),
        (("--api-key", "a b\n"), "API key"),
        (("--api-key", " a"), "blank"),
        (("--served-model-name", ""), "--served-model-name"),
        (("--max-waiting", "-1"), "max_waiting=-1"),
        (("--request-timeout", "0"), "request_timeout"),
        (("--drain-timeout", "-5"), "drain_timeout"),
        (("--max-body-bytes", "1"), "max_body_bytes"),
        (("--max-model-len", "1"), "max_model_len"),
        (("--max-num-seqs", "0"), "max_num_seqs"),
        (("--dtype", "float12"), "dtype"),
        (("--quantization", "int3"), "quantization"),
        (("--device", "tpu"), "device"),
        (("--port", "70000"), "--port=70000"),
        (("--host", "no.such.host.invalid"), "--host"),
        (("--chat-template", "nowhere.jinja"), "--chat-template"),
        (("--ssl-keyfile", "nowhere.pem"), "--ssl"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_options_that_cannot_work(
    mor: Mor, tiny: TinyRun, options: tuple[str, str], match: str
) -> None:
    said = one_sentence(mor("serve", tiny.run, "--port", 0, *options), 1)
    assert match in said


def test_a_length_that_does_not_fit(mor: Mor, tiny: TinyRun) -> None:
    said = one_sentence(mor("serve", tiny.run, "--port", 0, "--max-model-len", 10**6), 1)
    assert "the model takes 64" in said
    memory = ("--kv-cache-memory-bytes", 9000)
    said = one_sentence(mor("serve", tiny.run, "--port", 0, *memory), 1)
    assert "--kv-cache-memory-bytes" in said or "kv_cache_memory_bytes" in said


def test_a_port_that_is_taken(mor: Mor, tiny: TinyRun) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port={port}" in one_sentence(mor("serve", tiny.run, "--port", port), 1)


def test_a_port_that_another_server_takes_while_the_model_loads(
    mor: Mor, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both can bind the port, since neither listens yet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))

        def load(*args: object) -> LLM:
            other.listen()
            return LLM(*args)  # type: ignore[arg-type]

        monkeypatch.setattr("mor.cli.serve.LLM", load)
        quiet = ("--log-level", "error")
        said = one_sentence(mor("serve", tiny.run, "--port", port, *quiet), 1)
    assert f"--port={port}: another server was faster" in said


def test_no_model(mor: Mor) -> None:
    assert "does not exist" in one_sentence(mor("serve", "nowhere", "--port", 0), 1)


def test_without_the_extra_it_says_what_to_install(
    mor: Mor, tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("mor.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    said = one_sentence(mor("serve", tiny.run), 1)
    assert "pip install 'mixture-of-recursions[serve]'" in said
