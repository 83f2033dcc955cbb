"""The depth page in a real browser, against a real server."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from live_server import KEY, LiveServer

from mor.report.palette import DEPTH_COLORS, depth_color_index

CHROMIUM = Path("/usr/bin/chromium")
PAGE = Path(__file__).parents[2] / "src/mor/serve/static"
RECURSIONS = 3
PROMPT = "the cat sat on"


# -- the files --------------------------------------------------------------------------------


def test_the_page_has_the_colors_of_the_reports() -> None:
    css = (PAGE / "page.css").read_text()
    light, dark = (re.findall(r"--d\d: (#\w{6})", part) for part in css.split("@media", 2)[:2])
    assert light == [shade.light for shade in DEPTH_COLORS]
    assert dark == [shade.dark for shade in DEPTH_COLORS]


def test_the_page_holds_no_script_no_style_and_no_other_host() -> None:
    html = (PAGE / "index.html").read_text()
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for path in PAGE.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")  # a name, no address
        assert not re.search(r"https?:|[\"'(]//", text), path.name
    assert not re.search(r'(src|href)="/', html)  # it works below a proxy's path, too


# -- in the browser ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium."""
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page that somebody looks at, and what it asked of the network."""

    page: Any
    bodies: list[dict[str, Any]] = field(default_factory=list)
    hosts: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)

    def run(self, **settings: object) -> None:
        """Set fields, run, and wait for the end."""
        self.start(**settings)
        self.wait("Done")

    def start(self, **settings: object) -> None:
        for name, value in settings.items():
            if isinstance(value, bool):
                self.page.set_checked(f"#{name}", value)
            else:
                self.page.fill(f"#{name}", str(value))
        self.page.press("#prompt", "Control+Enter")

    def wait(self, words: str) -> str:
        """Until the status line says so; all of it."""
        from playwright.sync_api import expect

        expect(self.page.locator("#status")).to_contain_text(words, timeout=20_000)
        return self.page.text_content("#status")

    def tokens(self, pane: int = 0) -> list[dict[str, Any]]:
        """Text, recursion count and colors of each span of a pane."""
        return (
            self.page.locator(".tokens")
            .nth(pane)
            .evaluate(
                """box => [...box.children].map(span => ({
                text: span.textContent,
                count: Number(span.dataset.n),
                color: getComputedStyle(span).backgroundColor,
                line: parseFloat(getComputedStyle(span).borderBottomWidth),
                prompt: span.classList.contains("prompt"),
            }))"""
            )
        )


def look(browser: Any, server: LiveServer, **context: Any) -> Iterator[Visit]:
    """Open the page; afterwards it must have spoken to nobody else, and complained of nothing."""
    credentials = {"username": "mor", "password": KEY}
    with browser.new_context(http_credentials=credentials, **context) as opened:
        page = opened.new_page()
        visit = Visit(page)

        def asked(request: Any) -> None:
            visit.hosts.add(urlsplit(request.url).netloc)
            if request.url.endswith("/v1/completions"):
                visit.bodies.append(json.loads(request.post_data))

        page.on("request", asked)
        page.on("pageerror", lambda error: visit.complaints.append(str(error)))
        page.on("console", lambda said: visit.complaints.append(said.text))
        page.goto(server.url)
        page.locator("#model b").wait_for()
        yield visit
        assert visit.hosts == {urlsplit(server.url).netloc}
        assert visit.complaints == []


@pytest.fixture
def visit(browser: Any, server: LiveServer) -> Iterator[Visit]:
    yield from look(browser, server, color_scheme="light")


def rgb(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgb({red}, {green}, {blue})"


def visible(text: str) -> str:
    """Control characters as the page shows them."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}
    return text.translate({**pictures, 0x7F: 0x2421})


def test_tokens_and_colors_are_those_of_the_answer(visit: Visit, server: LiveServer) -> None:
    visit.run(prompt=PROMPT, length=60)
    (body,) = visit.bodies
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == (PROMPT, 60, 0)
    answer = server.post("/v1/completions", **{**body, "stream": False, "stream_options": None})
    (choice,) = answer.json()["choices"]
    tokens = visit.tokens()
    counts = choice["prompt_recursion_counts"] + choice["recursion_counts"]
    assert [token["count"] for token in tokens] == counts
    assert len(set(choice["recursion_counts"])) > 1  # else this test would show nothing
    end = "\u220e" if choice["finish_reason"] == "stop" else ""
    assert "".join(token["text"] for token in tokens) == visible(choice["text"]) + end
    assert [t["prompt"] for t in tokens].count(True) == len(choice["prompt_token_ids"])
    for token in tokens:
        shade = depth_color_index(token["count"], RECURSIONS)
        if not token["prompt"]:
            assert token["color"] == rgb(DEPTH_COLORS[shade].light)
        assert (token["line"] > 0) == (token["count"] > 1)
    rows = visit.page.locator(".pane .bars .value").all_text_contents()
    generated = choice["recursion_counts"]
    assert [int(row.split()[0]) for row in rows] == [generated.count(n) for n in (1, 2, 3)]
    mean = sum(generated) / len(generated)
    assert visit.page.text_content("#status") == (
        f"Done: {len(generated)} tokens, {mean:.2f} recursions on average."
    )
    figures = visit.page.locator(".pane .figures dd").all_text_contents()
    assert float(figures[1]) > 0
    assert figures[4] == f"{100 * answer.json()['usage']['flops_saved']:.0f} %"


def test_a_token_tells_its_depth_and_probability(visit: Visit) -> None:
    visit.run(prompt=PROMPT, length=5)
    visit.page.locator(".tokens .t").last.hover()
    score = r"log-probability \N{MINUS SIGN}?[\d.]+ \([\de.-]+ %\)"
    about = r"token \d+: \".*\"\n[123] of 3 recursions\n" + score
    assert re.fullmatch(about, visit.page.text_content("#tip"))
    assert visit.page.is_visible("#tip")
    visit.page.focus(".tokens")
    visit.page.keyboard.press("Home")
    said = visit.page.text_content(".readout")
    assert re.fullmatch(r"prompt token 1: \".*\", [123] of 3 recursions", said)  # nothing before it
    visit.page.keyboard.press("End")
    visit.page.keyboard.press("ArrowLeft")
    place = len(visit.tokens()) - 1
    assert visit.page.text_content(".readout").startswith(f"token {place}: ")
    assert visit.page.locator(".t.at").count() == 1


def test_side_by_side_with_full_depth(visit: Visit) -> None:
    visit.run(prompt=PROMPT, length=20, seed=11, compare=True)
    adaptive, full = visit.bodies
    assert full == {**adaptive, "min_recursions": RECURSIONS, "max_recursions": RECURSIONS}
    assert adaptive["seed"] == 11
    assert "max_recursions" not in adaptive
    assert {token["count"] for token in visit.tokens(1)} == {RECURSIONS}
    assert len({token["count"] for token in visit.tokens(0)}) > 1
    titles = visit.page.locator(".pane h2").all_text_contents()
    assert titles == ["Adaptive", "Full depth"]
    left, right = (visit.page.locator(".pane").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert left["x"] + left["width"] <= right["x"]


def test_the_slider_limits_the_depth(visit: Visit) -> None:
    visit.page.focus("#recursions")
    visit.page.keyboard.press("ArrowLeft")
    assert visit.page.text_content("#recursions-value") == "2 of 3"
    visit.page.focus("#temperature")
    visit.page.keyboard.press("End")
    visit.run(prompt=PROMPT, length=30)
    (body,) = visit.bodies
    assert (body["max_recursions"], body["temperature"]) == (2, 2)
    assert {token["count"] for token in visit.tokens()} == {1, 2}


def test_escape_stops_the_run(visit: Visit, server: LiveServer) -> None:
    visit.start(prompt=PROMPT, length=240, compare=True)
    visit.page.locator(".t:not(.prompt)").first.wait_for()
    assert visit.page.is_disabled("#run")
    visit.page.keyboard.press("Escape")
    visit.wait("Stopped")
    shown = [len(visit.tokens(pane)) for pane in (0, 1)]
    server.idle()
    assert visit.page.is_enabled("#run")
    assert visit.page.is_disabled("#stop")
    assert [len(visit.tokens(pane)) for pane in (0, 1)] == shown
    assert min(shown) < 240
    visit.run(length=3)
    assert len([t for t in visit.tokens() if not t["prompt"]]) <= 3


def test_a_reload_brings_prompt_and_settings_back(visit: Visit) -> None:
    visit.page.fill("#prompt", "naïve\ncafé 😀")
    visit.page.fill("#seed", "77")
    visit.page.focus("#recursions")
    visit.page.keyboard.press("Home")
    for name in ("compare", "numbers"):
        visit.page.check(f"#{name}")
    visit.page.reload()
    visit.page.locator("#model b").wait_for()
    values = {name: visit.page.input_value(f"#{name}") for name in ("prompt", "seed", "recursions")}
    assert values == {"prompt": "naïve\ncafé 😀", "seed": "77", "recursions": "1"}
    assert visit.page.is_checked("#compare")
    assert visit.page.text_content("#recursions-value") == "1 of 3"
    assert visit.page.locator(".pane").count() == 2
    assert "numbers" in visit.page.locator("body").get_attribute("class")


def test_an_error_is_one_sentence(visit: Visit) -> None:
    visit.start(prompt=PROMPT, length=9999)
    said = visit.wait("max_tokens is 9999")
    assert said.startswith("The prompt has ")
    assert "shorten the prompt" in said
    assert "error" in visit.page.get_attribute("#status", "class")
    assert visit.complaints == [
        "Failed to load resource: the server responded with a status of 400 (Bad Request)"
    ]
    visit.complaints.clear()
    visit.run(length=3)
    assert "error" not in visit.page.get_attribute("#status", "class")


def test_a_server_that_is_gone_is_told(visit: Visit) -> None:
    visit.page.route("**/v1/completions", lambda route: route.abort())
    visit.start(prompt=PROMPT, length=5)
    said = visit.wait("The server cannot be reached")
    assert said == "The server cannot be reached: is it still running?"
    assert visit.complaints == ["Failed to load resource: net::ERR_FAILED"]
    visit.complaints.clear()


def test_another_model_is_met(visit: Visit) -> None:
    def answer(route: Any) -> None:
        state = route.fetch().json()
        route.fulfill(json={**state, "model": "other", "num_recursions": 1})

    visit.page.route("**/depths", answer)
    visit.run(prompt=PROMPT, length=3)
    visit.page.get_by_text("one pass for every token").wait_for()
    assert visit.page.text_content("#model b") == "other"
    assert visit.page.is_disabled("#recursions")
    assert visit.page.is_disabled("#compare")


def test_thousands_of_tokens_reach_the_page_once_a_frame(visit: Visit) -> None:
    before, after, bars = visit.page.evaluate(
        """async () => {
            const { Pane } = await import("./page/pane.js");
            const pane = new Pane("Many", "", 3, { hide() {}, show() {} });
            document.getElementById("panes").append(pane.root);
            pane.start();
            for (let i = 0; i < 5000; i += 1)
                pane.add([{ id: i, text: " word", count: 1 + i % 3, logprob: -1 }]);
            const before = pane.box.children.length;
            await new Promise(requestAnimationFrame);
            await new Promise(requestAnimationFrame);
            const bars = [...pane.root.querySelectorAll(".value")].map(v => v.textContent);
            return [before, pane.box.children.length, bars];
        }"""
    )
    assert (before, after) == (0, 5000)
    assert bars == ["1667 · 33 %", "1667 · 33 %", "1666 · 33 %"]


def test_the_server_is_shown_at_work(visit: Visit, server: LiveServer) -> None:
    visit.run(prompt=PROMPT, length=5)
    state = server.idle()
    rows = visit.page.locator("#pages .value").all_text_contents()
    assert len(rows) == RECURSIONS + 2
    total = visit.page.locator("#server-figures dd").last.text_content()
    assert total.endswith(f"of {state['kv_pages_total']:,}")


def test_the_dark_page_on_a_phone(browser: Any, server: LiveServer) -> None:
    phone = {"width": 360, "height": 740}
    for visit in look(browser, server, color_scheme="dark", viewport=phone):
        visit.run(prompt=PROMPT, length=40, compare=True, numbers=True)
        assert visit.page.evaluate("document.documentElement.scrollWidth") == phone["width"]
        for token in visit.tokens():
            if not token["prompt"]:
                shade = DEPTH_COLORS[depth_color_index(token["count"], RECURSIONS)]
                assert token["color"] == rgb(shade.dark)
        upper, lower = (visit.page.locator(".pane").nth(i).bounding_box() for i in (0, 1))
        assert upper["y"] + upper["height"] <= lower["y"]


def test_without_the_key_there_is_no_page(browser: Any, server: LiveServer) -> None:
    with browser.new_context() as opened:
        answer = opened.request.get(server.url)
        assert answer.status == 401
        assert answer.headers["www-authenticate"].startswith("Basic")
