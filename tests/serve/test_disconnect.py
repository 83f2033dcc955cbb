"""Clients that leave, are slow, or send what no client should: the server goes on."""

import json
import random
import socket
import time
from typing import Any

import httpx
import pytest
from live_server import KEY, LiveServer

BODY = {"prompt": "the cat", "max_tokens": 250, "ignore_eos": True}
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
JSON = "Content-Type: application/json\r\n"


def raw(server: LiveServer, data: bytes, wait: float = 2.0) -> bytes:
    """What the server answers to some bytes, within a time."""
    with connected(server, wait) as connection:
        try:
            connection.sendall(data)
            return connection.recv(65536)
        except OSError:
            return b""


def connected(server: LiveServer, wait: float = 2.0) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=wait)


def request(body: bytes, *, extra: str = JSON) -> bytes:
    return f"{HEAD}{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body


def works(server: LiveServer) -> None:
    """The server still serves, with all its memory for keys and values."""
    answer = server.post("/v1/completions", prompt="the cat", max_tokens=3, ignore_eos=True)
    assert answer.status_code == 200
    state = server.idle()
    assert state["kv_pages_by_depth"] == [0, 0, 0]
    assert state["kv_pages_used"] == state["kv_pages_cached"]
    assert server.process.poll() is None


def resident(server: LiveServer) -> int:
    """Bytes of memory that the server has."""
    with open(f"/proc/{server.process.pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * 4096


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(server: LiveServer, stream: bool) -> None:
    server.idle()
    before = server.metric("mor:request_success_total", finished_reason="abort")
    connections = []
    for _ in range(4):
        connections.append(connected(server))
        connections[-1].sendall(request(json.dumps({**BODY, "n": 4, "stream": stream}).encode()))
    if stream:
        assert all(connection.recv(10) for connection in connections)
    end = time.monotonic() + 60
    while server.get("/depths")["running"] == 0:
        assert time.monotonic() < end, "they never started"
    for connection in connections:
        connection.close()
    works(server)
    aborted = server.metric("mor:request_success_total", finished_reason="abort")
    assert aborted == before + 4


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"[" * 100_000 + b"]" * 100_000, 400),
        (b'{"prompt":' + b"[" * 50_000 + b"1" + b"]" * 50_000 + b"}", 400),
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, 400),
        (b'{"prompt": "\xff\xfe"}', 400),
        (b'\xef\xbb\xbf{"prompt": "x"}', 200),
        ('{"prompt": "x"}'.encode("utf-16"), 200),
        (b'{"prompt": "x", "prompt": 1}', 400),
        (b'{"prompt": ' + b"9" * 100_000 + b"}", 400),
        (b'{"prompt": [' + b"9" * 5_000 + b"]}", 400),
        (b"", 400),
        (b"null", 400),
        (b'"x"', 400),
        (b"[]", 400),
        (b'{"prompt": "x"', 400),
        (b'{"prompt": "x"}garbage', 400),
        (b"\x00" * 100, 400),
        (b" " * (9 * 2**20), 413),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else None,
)
def test_bodies_that_are_no_requests(server: LiveServer, body: bytes, status: int) -> None:
    answer = server.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status
    assert ("error" in answer.json()) == (status != 200)
    works(server)


def test_a_huge_body_without_a_length_is_stopped(server: LiveServer) -> None:
    before = resident(server)

    def endless() -> Any:
        for _ in range(64):
            yield b" " * 2**20

    try:
        status = server.http.post("/v1/completions", content=endless()).status_code
    except httpx.HTTPError:  # it answered and hung up before all was sent
        status = 413
    assert status == 413
    works(server)
    assert resident(server) < before + 64 * 2**20


def test_bytes_that_are_no_http(server: LiveServer) -> None:
    draw = random.Random(0)
    garbage = [draw.randbytes(draw.randint(1, 3000)) for _ in range(10)]
    garbage += [
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ]
    for data in garbage:
        answer = raw(server, data, wait=0.1)
        assert answer == b"" or b" 4" in answer[:20], answer[:100]
    works(server)
    assert "Traceback" not in server.log


def test_slow_clients_do_not_hold_up_others(server: LiveServer) -> None:
    slow = [connected(server, wait=10) for _ in range(20)]
    for connection in slow[:10]:
        connection.sendall(b"POST /v1/comp")
    for connection in slow[10:]:
        connection.sendall(request(b'{"prompt": "x", "max_tokens": 1}')[:-5])
    works(server)
    for connection in slow[10:]:
        connection.sendall(request(b'{"prompt": "x", "max_tokens": 1}')[-5:])
        assert b" 200 " in connection.recv(65536)[:20]
    for connection in slow:
        connection.close()
    works(server)


def test_a_client_that_does_not_read_loses_nothing(server: LiveServer) -> None:
    with connected(server, wait=10) as connection:
        body = {**BODY, "stream": True, "n": 3, "logprobs": 20, "temperature": 0}
        connection.sendall(request(json.dumps(body).encode(), extra=JSON + "Connection: close\r\n"))
        server.idle(30)
        data = b""
        while part := connection.recv(65536):
            data += part
    assert data.count(b'"finish_reason":"length"') == 3
    assert b"data: [DONE]" in data
    works(server)


def test_random_bodies_are_answered(server: LiveServer) -> None:
    draw = random.Random(1)
    fields = ["prompt", "max_tokens", "n", "stop", "stream", "logprobs", "temperature", "echo", "x"]
    values = [None, True, 0, -1, 1, 3, 2.5, 1e300, "", "x", "\x00", [], [1], ["a"], [[1, 2]], {}]
    before = resident(server)
    seen = set()
    for _ in range(150):
        body = {name: draw.choice(values) for name in draw.sample(fields, draw.randint(1, 4))}
        answer = server.http.post("/v1/completions", json=body)
        assert answer.status_code in (200, 400), (body, answer.text)
        seen.add(answer.status_code)
    assert seen == {200, 400}
    works(server)
    assert resident(server) < before + 64 * 2**20
