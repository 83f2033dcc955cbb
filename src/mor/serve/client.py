"""`Client`: calls OpenAI-compatible servers over asyncio's streams, without a further library.

The events of a stream are given as the bytes that came, not parsed: a benchmark can note when they
came and read them later. While a client is busy it notes events late: httpx takes three times the
processor time of this module, and aiohttp no less than it (docs/log.md has the comparison).
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mor.errors import CapacityError, ConfigError, MorError, RequestError, nearest

_CONNECT_TIMEOUT_S = 10.0
_BUSY = (429, 503)  # statuses of a server that may take the request later
_DONE = b"[DONE]"

Headers = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Client:
    """A server's address and API key; every call opens a connection of its own."""

    host: str
    port: int
    secure: bool = False
    prefix: str = ""
    """Comes before each call's path; has no slash at its end."""
    api_key: str | None = None

    @classmethod
    def of(cls, url: str, api_key: str | None = None) -> "Client":
        """A client of the server at `url`, with or without `/v1` at its end.

        Raises:
            ConfigError: `url` is no http or https address.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no address: {error}.") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address: write it like http://127.0.0.1:8000.")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(
            host=parts.hostname,
            port=port or (443 if secure else 80),
            secure=secure,
            prefix=prefix,
            api_key=api_key,
        )

    @property
    def url(self) -> str:
        """The address as a text."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' * self.secure}://{host}:{self.port}{self.prefix}"

    async def get(self, path: str) -> Any:
        """The JSON value at `path`.

        Raises:
            RequestError: the server cannot be reached, refuses or answers something else.
            CapacityError: the server has no room.
        """
        async with self._exchange("GET", path, None) as parts:
            return self._json(b"".join([part async for part in parts]))

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The JSON value that the server answers to a JSON body.

        Raises:
            RequestError, CapacityError: as for `get`.
        """
        async with self._exchange("POST", path, body) as parts:
            return self._json(b"".join([part async for part in parts]))

    async def card(self, model: str | None = None) -> Mapping[str, Any]:
        """The entry of `/v1/models` for a model; None takes the first.

        Raises:
            RequestError: as for `get`, or the server does not list its models as OpenAI does.
            CapacityError: as for `get`.
            ConfigError: the server does not serve this model.
        """
        answer = await self.get("/v1/models")
        try:
            cards = {str(card["id"]): card for card in answer["data"]}
        except (KeyError, TypeError) as error:
            raise RequestError(f"{self.url}/v1/models lists no models as OpenAI does.") from error
        if not cards:
            raise RequestError(f"{self.url} serves no model.")
        if model is not None and model not in cards:
            raise ConfigError(f"model {model!r} is not served there: {nearest(model, cards)}")
        return cards[model] if model is not None else next(iter(cards.values()))

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes]:
        """The data of each server-sent event up to `[DONE]`, as JSON that is not parsed yet.

        Closing the iterator closes the connection, which ends the request.

        Raises:
            RequestError: as for `get`, or the stream ends early.
            CapacityError: the server has no room.
        """
        async with self._exchange("POST", path, body) as parts:
            rest = b""  # the beginning of a line whose end has not come
            async for part in parts:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if not line.startswith(b"data:"):  # an empty line, or a comment
                        continue
                    data = line[5:].strip()
                    if data == _DONE:
                        return
                    yield data
        raise RequestError(f"{self.url}{path}: the stream ended before it was done.")

    @asynccontextmanager
    async def _exchange(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> AsyncGenerator[AsyncGenerator[bytes]]:
        """Send a request; gives the parts of the response's body if its status is 200.

        Raises:
            RequestError, CapacityError: as for `get`.
        """
        writer: asyncio.StreamWriter | None = None
        try:
            context = ssl.create_default_context() if self.secure else None
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context)
            writer.write(self._request(method, path, body))
            await writer.drain()
            status, headers = await _read_head(reader)
            async with aclosing(_read_body(reader, headers)) as parts:
                if status != 200:
                    self._raise_refusal(status, path, b"".join([part async for part in parts]))
                yield parts
        except MorError:
            raise
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            why = str(error) or type(error).__name__
            raise RequestError(
                f"{self.url} gives no usable answer ({why}): does a server run there?"
            ) from error
        finally:
            if writer is not None:
                writer.close()

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        host = self.url.split("//")[1].split("/")[0]
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {host}", "Connection: close"]
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        if self.api_key is not None:
            lines.append(f"Authorization: Bearer {self.api_key}")
        return "\r\n".join([*lines, "", ""]).encode() + content

    def _raise_refusal(self, status: int, path: str, body: bytes) -> None:
        """Raise the server's error message, whether it has OpenAI's shape or not."""
        try:
            message = str(json.loads(body)["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = body[:200].decode(errors="replace").strip() or "no reason given"
        error = CapacityError if status in _BUSY else RequestError
        raise error(f"{self.url}{path} answers {status}: {message}")

    def _json(self, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError as error:
            raise RequestError(f"{self.url} does not answer JSON: is it the right port?") from error


def read_event(data: bytes) -> dict[str, Any]:
    """The JSON object of a stream's event.

    Raises:
        RequestError: the event tells an error of the server, or is no JSON object.
    """
    try:
        event = json.loads(data)
    except ValueError as error:
        raise RequestError(f"the stream holds {data[:80]!r}, which is no JSON.") from error
    if not isinstance(event, dict):
        raise RequestError(f"the stream holds {data[:80]!r}, which is no JSON object.")
    if "error" in event:
        error = event["error"]
        raise RequestError(str(error.get("message", error) if isinstance(error, dict) else error))
    return event


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, Headers]:
    """A response's status and its headers, by their names in small letters."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.split("\r\n")
    version, status = first.split(" ")[:2]
    if not version.startswith("HTTP/"):
        raise ValueError("it does not speak HTTP")
    pairs = (line.partition(":") for line in lines if line)
    return int(status), {name.lower(): value.strip() for name, _, value in pairs}


async def _read_body(reader: asyncio.StreamReader, headers: Headers) -> AsyncGenerator[bytes]:
    """A response's body in the parts in which it comes."""
    if "chunked" in headers.get("transfer-encoding", "").lower():
        # A chunk is its size in hexadecimal digits and its data, each with a line end; 0 ends it.
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:  # the body ends with the connection
        while part := await reader.read(1 << 16):
            yield part
