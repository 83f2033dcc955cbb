"""`Auth`: ASGI middleware that checks API keys on every route but `/health`."""

import base64
import binascii
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mor.serve.errors import HTTPError

_OPEN = frozenset(("/health",))  # routes that need no key
_PAGES = ("/page/",)  # a browser logs in with HTTP Basic, and the key as its password
_PAGE_ROUTES = frozenset(("/", "/depths"))
_PAGE_HEADER = ("x-requested-with", "depth-page")  # a foreign site's script could not send it


class Auth:
    """Answers 401 to requests that carry none of the keys.

    API clients send a key as `Authorization: Bearer KEY`. The depth page is opened in a browser,
    which cannot: it logs in with HTTP Basic, any user name, and the key as the password. Without
    keys every request passes.
    """

    def __init__(self, app: ASGIApp, api_keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may, otherwise answer 401."""
        if scope["type"] != "http" or not self._keys or scope["path"] in _OPEN:
            await self._app(scope, receive, send)
            return
        path, headers = scope["path"], Headers(scope=scope)
        name, value = _PAGE_HEADER
        is_page = path in _PAGE_ROUTES or path.startswith(_PAGES) or headers.get(name) == value
        given = _key_of(headers.get("authorization", ""), is_page)
        # All keys are compared, each in constant time: how long it takes tells nothing of them.
        if sum(hmac.compare_digest(given, key) for key in self._keys):
            await self._app(scope, receive, send)
            return
        # Basic makes a browser ask for the password.
        challenge = 'Basic realm="mor", charset="UTF-8"' if is_page else "Bearer"
        error = HTTPError(
            401,
            "this server asks for a key: send the header `Authorization: Bearer KEY`.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": challenge},
        )
        await error.response(scope, receive, send)


def _key_of(header: str, is_page: bool) -> bytes:
    """The key in an `Authorization` header; b"" (never a valid key) if there is none."""
    scheme, _, value = header.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("latin-1")  # the bytes that were sent
    if scheme.lower() == "basic" and is_page:
        try:
            _, _, password = base64.b64decode(value, validate=True).partition(b":")
        except (binascii.Error, ValueError):
            return b""
        return password
    return b""
