"""With a key set, all routes but `/health` refuse strangers; logs hold neither keys nor prompts."""

import base64

import httpx
import openai
import pytest
from live_server import KEY, LiveServer

ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("GET", "/version"),
    ("GET", "/metrics"),
    ("GET", "/depths"),
    ("GET", "/openapi.json"),
    ("GET", "/"),
    ("GET", "/page/page.js"),
    ("GET", "/nowhere"),
    ("GET", "/health//"),
    ("GET", "/health/"),
    ("OPTIONS", "/v1/completions"),
]
WRONG = [
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer -"},
    {"Authorization": f"Bearer {KEY}x"},
    {"Authorization": f"Bearer {KEY[:-1]}"},
    {"Authorization": KEY},
    {"Authorization": f"Token {KEY}"},
    {"Authorization": b"Bearer \xff\xfe"},
    {"Authorization": "Basic !!!"},
    {"X-Api-Key": KEY},
]


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"me:{password}".encode()).decode()}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_strangers_are_refused(server: LiveServer, method: str, path: str) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        answer = stranger.request(method, path)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    scheme = "Basic" if path in ("/", "/depths") or path.startswith("/page/") else "Bearer"
    assert answer.headers["www-authenticate"].startswith(scheme)


@pytest.mark.parametrize("headers", WRONG, ids=str)
def test_what_is_not_the_key(server: LiveServer, headers: dict[str, str]) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        assert stranger.get("/v1/models", headers=headers).status_code == 401
        assert stranger.get("/depths", headers=headers).status_code == 401


def test_the_openai_client_hears_of_it(server: LiveServer) -> None:
    wrong = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with wrong, pytest.raises(openai.AuthenticationError, match="asks for a key"):
        wrong.models.list()


def test_a_browser_may_log_in_to_the_page_only(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as browser:
        assert browser.get("/depths", headers=basic(KEY)).status_code == 200
        assert browser.get("/", headers=basic(KEY)).status_code == 200
        assert browser.get("/depths", headers=basic("wrong")).status_code == 401
        assert browser.get("/v1/models", headers=basic(KEY)).status_code == 401
        ours = {"X-Requested-With": "depth-page"}  # what the page asks for itself
        assert browser.get("/v1/models", headers=basic(KEY) | ours).status_code == 200
        assert browser.get("/v1/models", headers=basic("wrong") | ours).status_code == 401
        assert browser.get("/v1/models", headers=ours).status_code == 401


def test_health_is_open_and_tells_nothing(server: LiveServer) -> None:
    with httpx.Client(base_url=server.url) as stranger:
        answer = stranger.get("/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_logs_hold_no_key_and_no_prompt(server: LiveServer) -> None:
    secret = "a-very-private-prompt"
    headers = {"X-Request-Id": "my-id.1"}
    body = {"prompt": secret, "max_tokens": 2}
    answer = server.http.post("/v1/completions", json=body, headers=headers)
    assert answer.headers["x-request-id"] == "my-id.1"
    assert answer.json()["id"] == "cmpl-my-id.1"
    wrong = {"prompt": secret, secret: secret, "stop": [1]}
    assert server.http.post("/v1/completions", json=wrong).status_code == 400
    server.http.get("/v1/models", params={"prompt": secret, "key": KEY})
    forged = {"X-Request-Id": "x\tINFO forged"}
    made = server.http.get("/v1/models", headers=forged).headers["x-request-id"]
    assert made.isalnum()
    server.http.get("/v1/models/%0aINFO forged")
    log = server.log
    assert "my-id.1 POST /v1/completions 200" in log
    assert secret not in log
    assert KEY not in log
    assert "Traceback" not in log
    assert all("INFO forged" not in line[:30] for line in log.splitlines())
