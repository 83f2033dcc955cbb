"""`Fake`: a stand-in for `mor serve` that sends fixed tokens over HTTP and records the requests."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKENS = ("The", " token", " goes", " deep", "er", ".")


@dataclass
class Fake:
    """What the server answers, and the requests that it got."""

    num_recursions: int = 3
    vocab_size: int | None = 50
    has_chat: bool = True
    chunked: bool = True
    delay_s: float = 0.0
    """Seconds before each token."""
    refuse: tuple[int, str] | None = None
    """Status and message for every request to generate."""
    break_after: int | None = None
    """Tokens after which a stream says that something went wrong."""
    cut_after: int | None = None
    """Tokens after which the connection closes."""
    api_key: str | None = None
    port: int = 0
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Path and body of each POST request."""
    aborted: list[str] = field(default_factory=list)
    """Paths of streams whose clients left before the end."""
    at_once: int = 0
    """Streams under way."""
    max_at_once: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def counts(self, body: dict[str, Any]) -> list[int]:
        """Recursion counts of the tokens that it will send."""
        number = body.get("max_tokens") or body.get("max_completion_tokens") or len(TOKENS)
        maximum = body.get("max_recursions") or self.num_recursions
        minimum = body.get("min_recursions") or 1
        free = [1 + i % self.num_recursions for i in range(number)]
        return [max(minimum, min(maximum, count)) for count in free]

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a stream."""
        chat = path.endswith("/chat/completions")
        if chat:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        counts = self.counts(body)
        for number, count in enumerate(counts):
            if number == self.break_after:
                yield {"error": {"message": "the engine fell over.", "type": "server_error"}}
                return
            text = TOKENS[number % len(TOKENS)]
            said = {"delta": {"content": text}} if chat else {"text": text}
            last = number + 1 == len(counts)
            yield {
                "choices": [
                    {
                        "index": 0,
                        **said,
                        "token_ids": [number],
                        "recursion_counts": [count],
                        "finish_reason": "length" if last else None,
                    }
                ]
            }
        prompt = body.get("prompt") or ""
        yield {
            "choices": [],
            "usage": {
                "prompt_tokens": len(prompt),
                "completion_tokens": len(counts),
                "mean_recursions": sum(counts) / len(counts),
                "flops_saved": 0.25,
            },
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, fake: Fake) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fake = fake
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    @property
    def fake(self) -> Fake:
        return self.server.fake

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if self._stranger():
            return
        if self.path == "/v1/models":
            card = {
                "id": "fake",
                "vocab_size": self.fake.vocab_size,
                "num_recursions": self.fake.num_recursions,
            }
            self._json(200, {"object": "list", "data": [card]})
        else:
            self._error(404, f"there is no {self.path}.")

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = json.loads(self.rfile.read(length))
        if self._stranger():
            return
        with self.server.lock:
            self.fake.asked.append((self.path, body))
        if self.fake.refuse is not None:
            self._error(*self.fake.refuse)
        elif "messages" in body and not self.fake.has_chat:
            self._error(400, "the model has no chat template: use /v1/completions.")
        elif self.path == "/tokenize":
            self._json(200, {"count": 1, "tokens": [1]})
        else:
            self._stream(body)

    def _stranger(self) -> bool:
        wrong = self.fake.api_key is not None and (
            self.headers["Authorization"] != f"Bearer {self.fake.api_key}"
        )
        if wrong:
            self._error(401, "wrong API key.")
        return wrong

    def _stream(self, body: dict[str, Any]) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        if self.fake.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        with self.server.lock:
            self.fake.at_once += 1
            self.fake.max_at_once = max(self.fake.max_at_once, self.fake.at_once)
        here = 1
        try:
            for number, event in enumerate(self.fake.events(self.path, body)):
                if number == self.fake.cut_after:
                    return
                time.sleep(self.fake.delay_s)
                self._send(f": ping\r\n\r\ndata: {json.dumps(event)}\r\n\r\n")
            here = self._left(here)  # before the client can know, and send its next request
            self._send("data: [DONE]\r\n\r\n")
            if self.fake.chunked:
                self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.fake.aborted.append(self.path)
        finally:
            self._left(here)

    def _left(self, here: int) -> int:
        with self.server.lock:
            self.fake.at_once -= here
        return 0

    def _send(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if self.fake.chunked else data)

    def _error(self, status: int, message: str) -> None:
        self._json(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _json(self, status: int, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """The fake on a free port of this machine."""
    server = _Server(fake)
    fake.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
