"""The client: addresses, answers, streams, and what it says when something is wrong."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest

from fake_server import Fake, serving
from mor.errors import CapacityError, ConfigError, RequestError
from mor.serve.client import Client, read_event


async def collect(
    client: Client, body: dict[str, Any], maximum: int = 10**9
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    async with aclosing(client.stream("/v1/completions", body)) as events:
        async for data in events:
            found.append(read_event(data))
            if len(found) == maximum:
                break
    return found


@contextmanager
def answering(reply: bytes) -> Iterator[str]:
    """A server that answers anything with `reply`; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(reply)

        thread = threading.Thread(target=answer)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("http://localhost:8000", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.com/models/a/v1", "https://example.com:443/models/a"),
        ("http://[::1]:80/", "http://[::1]:80"),
    ],
)
def test_an_address_is_read(url: str, same: str) -> None:
    assert Client.of(url).url == same


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://a", "http://", "http://a:b", "http://["])
def test_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        Client.of(url)


@pytest.mark.parametrize("chunked", [True, False])
def test_a_stream_gives_every_event(chunked: bool) -> None:
    with serving(Fake(chunked=chunked)) as fake:
        events = asyncio.run(collect(Client.of(fake.url), {"prompt": "a", "max_tokens": 4}))
    choices = [event["choices"][0] for event in events[:-1]]
    assert [c["text"] for c in choices] == ["The", " token", " goes", " deep"]
    assert [c["recursion_counts"] for c in choices] == [[1], [2], [3], [1]]
    assert events[-1]["usage"]["completion_tokens"] == 4


def test_the_key_is_sent_and_a_stranger_hears_why() -> None:
    with serving(Fake(api_key="sesame")) as fake:
        assert asyncio.run(Client.of(fake.url, "sesame").get("/v1/models"))["data"]
        with pytest.raises(RequestError, match=r"/v1/models answers 401: wrong API key\."):
            asyncio.run(Client.of(fake.url).get("/v1/models"))


@pytest.mark.parametrize(("status", "kind"), [(429, CapacityError), (400, RequestError)])
def test_a_refusal_says_what_the_server_says(status: int, kind: type[Exception]) -> None:
    with (
        serving(Fake(refuse=(status, "too much."))) as fake,
        pytest.raises(kind, match=rf"answers {status}: too much\."),
    ):
        asyncio.run(collect(Client.of(fake.url), {}))


def test_a_stream_that_stops_early_is_an_error() -> None:
    for fake in (Fake(cut_after=2), Fake(cut_after=2, chunked=False)):
        with serving(fake), pytest.raises(RequestError, match=r"stream ended|no usable answer"):
            asyncio.run(collect(Client.of(fake.url), {}))


def test_an_error_within_a_stream_is_raised() -> None:
    with serving(Fake(break_after=1)) as fake, pytest.raises(RequestError, match="fell over"):
        asyncio.run(collect(Client.of(fake.url), {}))


def test_closing_a_stream_ends_the_request() -> None:
    with serving(Fake(delay_s=0.005)) as fake:
        events = asyncio.run(collect(Client.of(fake.url), {"max_tokens": 5000}, maximum=2))
        assert len(events) == 2
        deadline = time.monotonic() + 60
        while not fake.aborted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert fake.aborted == ["/v1/completions"]


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(RequestError, match="does a server run there"):
        asyncio.run(Client.of(f"http://127.0.0.1:{port}").get("/v1/models"))


@pytest.mark.parametrize(
    "reply",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n\r\n",
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\n" + b"x" * (1 << 17),
    ],
    ids=["another protocol", "nothing", "no JSON", "bad chunk", "too short", "endless head"],
)
def test_no_server_of_ours(reply: bytes) -> None:
    with answering(reply) as url, pytest.raises(RequestError, match=url):
        asyncio.run(Client.of(url).get("/v1/models"))


@pytest.mark.parametrize(
    "data",
    [b"{", b"[1]", b'{"error": "no"}', b'{"error": {"message": "no"}}'],
)
def test_an_event_that_is_no_answer(data: bytes) -> None:
    with pytest.raises(RequestError, match=r"no"):
        read_event(data)


def test_values_are_posted_as_json() -> None:
    reply = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n" + json.dumps({"a": [1]}).encode()
    with answering(reply[:-1] + b" }") as url:
        assert asyncio.run(Client.of(url).post("/tokenize", {"prompt": "é"})) == {"a": [1]}
