"""The page in headless Chromium: conversations, emotions, what people type, two browsers, keyboard, dark, phone."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(package, reason="the page needs the extra `web`")

from ecore.pipeline import ECore  # noqa: E402
from tests.ecore.generation.dialogues import CONTEXTS, differing_model  # noqa: E402
from tests.ecore.serving.chats import Gate  # noqa: E402
from tests.ecore.serving.server import Server, serving  # noqa: E402

FILES = Path(__file__).parents[3] / "ecore/serving/page"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SAID = (CONTEXTS[0][0], CONTEXTS[2][0], CONTEXTS[3][0])


@pytest.fixture(scope="module")
def server(model: ECore) -> Iterator[Server]:
    with serving(model, page=True) as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="a browser test needs the package playwright")
    if CHROMIUM is None:
        pytest.skip("a browser test needs Chromium (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Page:
    """A tab on the page; ends with no error in it and nothing asked of another address."""

    def __init__(self, browser: Any, server: Server, **options: Any) -> None:
        from playwright.sync_api import expect

        self.expect = expect
        self.context = browser.new_context(**options)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.asked: list[Any] = []
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("dialog", lambda dialog: self.errors.append(f"dialog {dialog.message}"))
        self.tab.on("request", lambda request: self.asked.append(request))
        self.origin = f"http://127.0.0.1:{server.port}/"
        self.tab.goto(self.origin)
        expect(self.tab.locator("#model")).to_have_text("tiny", timeout=30_000)
        self.box = self.tab.get_by_label("Your message")

    def say(self, text: str) -> Any:
        """Send a message; the list item of its answer."""
        turns = self.tab.locator("#log > li").count()
        self.box.fill(text)
        self.box.press("Enter")
        answer = self.tab.locator("#log > li").nth(turns + 1)
        self.expect(answer.locator(".beside")).to_be_visible(timeout=30_000)
        return answer

    def bodies(self, path: str) -> list[Any]:
        return [json.loads(r.post_data) for r in self.asked if r.url == self.origin + path and r.post_data]

    def close(self) -> None:
        self.context.close()
        assert self.errors == []
        assert {
            request.url for request in self.asked if not request.url.startswith((self.origin, "data:"))
        } == set()


@pytest.fixture
def visit(browser: Any, server: Server) -> Iterator[Callable[..., Page]]:
    pages: list[Page] = []

    def visit(where: Server = server, **options: Any) -> Page:
        pages.append(Page(browser, where, **options))
        return pages[-1]

    yield visit
    for page in pages:
        page.close()


def shown(answer: Any) -> list[tuple[str, str]]:
    """The bars beside an answer."""
    rows = answer.locator(".beside li").all()
    return [(row.locator("span").nth(0).inner_text(), row.locator(".share").inner_text()) for row in rows]


def test_three_turns_and_their_emotions(visit: Callable[..., Page], model: ECore) -> None:
    page = visit()
    turns: list[str] = []
    seen = []
    for text in SAID:
        answer = page.say(text)
        turns.append(text)
        reply = model.respond(turns, max_length=8)
        page.expect(answer.locator(".said")).to_have_text(str(reply))
        assert [name for name, _ in shown(answer)] == [name for name, _ in reply.emotions[:5]]
        seen.append(shown(answer))
        turns.append(str(reply))
    assert seen[0] != seen[1] != seen[2]
    assert page.bodies("v1/chat/completions")[-1]["messages"][-1] == {"role": "user", "content": SAID[-1]}
    assert len(page.bodies("v1/chat/completions")[-1]["messages"]) == 5


def test_why(visit: Callable[..., Page], model: ECore) -> None:
    page = visit()
    answer = page.say(SAID[0])
    table = answer.locator("table.map")
    page.expect(table).to_be_hidden()
    answer.locator("summary").click()
    page.expect(table).to_be_visible()
    seen = model.perceive(SAID[0])
    assert seen.word_edges is not None
    assert seen.before is not None
    assert [cell.inner_text() for cell in table.locator("tbody th").all()] == list(seen.words)
    columns = [seen.names.index(name) for name, _ in seen.emotions[:8]]
    edges = seen.word_edges[:, columns]
    edges = edges / edges.abs().max()
    numbers = [
        [float(cell.inner_text().replace("−", "-")) for cell in row.locator("td").all()]
        for row in table.locator("tbody tr").all()
    ]
    assert numbers == [pytest.approx(row, abs=0.0051) for row in edges.tolist()]
    after = answer.get_by_role("region", name="Before and after correlation").locator("tbody tr").first
    assert float(after.locator("td").first.inner_text().replace("−", "-")) == pytest.approx(
        float(seen.before[columns[0]]), abs=0.006
    )
    assert answer.locator(".guide li").first.locator("span").first.inner_text() == seen.attention[0][0]
    for name in seen.relevant:
        assert name in answer.locator("b.guides").inner_text()


def test_the_hard_strategy_shows_the_emotions_that_it_keeps(visit: Callable[..., Page]) -> None:
    hard = ECore(differing_model("hard"))
    with serving(hard, page=True) as server:
        answer = visit(server).say(SAID[0])
        answer.locator("summary").click()
        assert answer.locator("p.guides").inner_text() == ", ".join(hard.perceive(SAID[0]).relevant)


def test_an_empty_message_is_not_sent(visit: Callable[..., Page]) -> None:
    page = visit()
    for text in ("", "   ", "\n"):
        page.box.fill(text)
        page.tab.get_by_role("button", name="Send").click()
        page.expect(page.tab.get_by_role("alert")).to_have_text("Write something first.")
    page.expect(page.box).to_be_focused()
    assert page.bodies("v1/chat/completions") == []
    assert page.tab.locator("#log > li").count() == 0


def test_a_very_long_message(visit: Callable[..., Page]) -> None:
    page = visit()
    page.say("word " * 3000)
    page.box.fill("x" * 20_000)
    page.box.press("Enter")
    page.expect(page.tab.get_by_role("alert")).to_contain_text("expected at most 16,384 characters")
    page.expect(page.box).to_have_value("x" * 20_000)
    assert page.tab.locator("#log > li").count() == 2
    page.say(SAID[0])
    page.expect(page.tab.get_by_role("alert")).to_be_hidden()
    assert page.tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


MARKUP = "<img src=x onerror=alert(1)><b>bold</b><script>alert(2)</script> & [a](http://example.org) {{x}}"


def test_markup_is_text(visit: Callable[..., Page]) -> None:
    page = visit()
    answer = page.say(MARKUP)
    page.expect(page.tab.locator(".user .said").first).to_have_text(MARKUP)
    answer.locator("summary").click()
    assert page.tab.locator("#log img, #log script, #log .said b, #log a").count() == 0


def test_two_browsers_have_conversations_of_their_own(visit: Callable[..., Page], model: ECore) -> None:
    one, two = visit(), visit()
    for page in (one, two):
        page.box.fill(SAID[0] if page is one else SAID[1])
    for page in (one, two):
        page.box.press("Enter")
    for page, text in ((one, SAID[0]), (two, SAID[1])):
        answer = page.tab.locator("#log > li").nth(1)
        page.expect(answer.locator(".beside")).to_be_visible(timeout=30_000)
        page.expect(answer.locator(".said")).to_have_text(str(model.respond(text, max_length=8)))
        assert page.tab.locator("#log > li").count() == 2


def test_undo_and_a_new_conversation(visit: Callable[..., Page]) -> None:
    page = visit()
    page.say(SAID[0])
    page.say(SAID[1])
    page.tab.get_by_role("button", name="Undo").click()
    page.expect(page.box).to_have_value(SAID[1])
    assert page.tab.locator("#log > li").count() == 2
    page.say(SAID[2])
    assert [m["content"] for m in page.bodies("v1/chat/completions")[-1]["messages"]][::2] == [
        SAID[0],
        SAID[2],
    ]
    page.tab.get_by_role("button", name="New conversation").click()
    assert page.tab.locator("#log > li").count() == 0
    page.expect(page.tab.get_by_text("Begin with an example")).to_be_visible()
    page.say(SAID[1])
    assert len(page.bodies("v1/chat/completions")[-1]["messages"]) == 1


def test_examples(visit: Callable[..., Page]) -> None:
    page = visit()
    page.tab.locator("#example-list button").last.click()
    page.expect(page.tab.locator("#log > li").nth(3).locator(".beside")).to_be_visible(timeout=30_000)
    assert [m["role"] for m in page.bodies("v1/chat/completions")[-1]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    page.expect(page.tab.locator("#examples")).to_be_hidden()


def test_decoding_controls_are_sent(visit: Callable[..., Page]) -> None:
    page = visit()
    page.tab.get_by_text("How answers are decoded").click()
    page.expect(page.tab.get_by_label("Words at most")).to_have_value("8")  # the server's own
    page.expect(page.tab.get_by_label("Beams", exact=True)).to_be_hidden()
    page.tab.get_by_label("Method").select_option("sample")
    page.tab.get_by_label("Temperature").fill("0.7")
    page.tab.get_by_label("Seed").fill("5")
    page.tab.get_by_label("Words at most").fill("4")
    page.say(SAID[0])
    sent = page.bodies("v1/chat/completions")[-1]
    assert {name: sent[name] for name in ("method", "temperature", "seed", "max_tokens")} == {
        "method": "sample",
        "temperature": 0.7,
        "seed": 5,
        "max_tokens": 4,
    }
    assert "beams" not in sent
    page.tab.get_by_label("Temperature").fill("-3")
    page.box.fill(SAID[1])
    page.box.press("Enter")
    page.expect(page.tab.get_by_role("alert")).to_contain_text("Temperature")
    assert page.bodies("v1/chat/completions")[-1] == sent


def test_stop_takes_the_message_back(visit: Callable[..., Page]) -> None:
    model = ECore(differing_model("soft"))
    gate = Gate(model)
    with serving(model, page=True) as server:
        page = visit(server)
        page.box.fill(SAID[0])
        page.box.press("Enter")
        page.tab.get_by_role("button", name="Stop").click()
        page.expect(page.box).to_have_value(SAID[0])
        assert page.tab.locator("#log > li").count() == 0
        page.expect(page.tab.get_by_role("alert")).to_be_hidden()
        gate.opened.set()
        page.say(SAID[1])


def test_keyboard_alone(visit: Callable[..., Page]) -> None:
    page = visit()
    press = page.tab.keyboard.press
    press("Tab")
    page.expect(page.tab.get_by_role("link", name="Skip to your message")).to_be_focused()
    press("Enter")
    page.box.focus()
    page.tab.keyboard.type("I passed")
    press("Shift+Enter")
    page.tab.keyboard.type("my exam!")
    press("Enter")
    answer = page.tab.locator("#log > li").nth(1)
    page.expect(answer.locator(".beside")).to_be_visible(timeout=30_000)
    assert page.bodies("v1/chat/completions")[-1]["messages"][-1]["content"] == "I passed\nmy exam!"
    page.expect(page.box).to_be_focused()
    press("Shift+Tab")  # back to the answer's details
    page.expect(answer.locator("summary")).to_be_focused()
    press("Enter")
    page.expect(answer.locator("table.map")).to_be_visible()
    assert page.tab.get_by_role("status").inner_text().startswith("E-CORE: ")
    for element in page.tab.locator("button:visible, input:visible, select:visible, textarea:visible").all():
        assert element.evaluate("e => e.labels?.length || e.textContent.trim()")


def test_dark_and_light(visit: Callable[..., Page]) -> None:
    grounds = {}
    for scheme, other in (("dark", "Light"), ("light", "Dark")):
        page = visit(color_scheme=scheme)
        ground = "() => getComputedStyle(document.body).backgroundColor"
        before = page.tab.evaluate(ground)
        page.tab.get_by_role("button", name=other, exact=True).click()
        after = page.tab.evaluate(ground)
        page.tab.reload()
        assert page.tab.evaluate(ground) == after  # it is remembered
        grounds[scheme] = (before, after)
    assert grounds["dark"] == grounds["light"][::-1]
    assert grounds["dark"][0] != grounds["dark"][1]


def test_a_phone_scrolls_in_one_direction(visit: Callable[..., Page]) -> None:
    page = visit(viewport={"width": 320, "height": 640}, has_touch=True)
    answer = page.say(SAID[2] + " " + "pneumonoultramicroscopicsilicovolcanoconiosis" * 3)
    answer.locator("summary").click()
    page.tab.get_by_text("How answers are decoded").click()
    page.tab.get_by_label("Method").select_option("sample")
    assert page.tab.evaluate("() => document.documentElement.scrollWidth <= innerWidth")


def test_a_token_comes_with_the_address(browser: Any, visit: Callable[..., Page], model: ECore) -> None:
    with serving(model, page=True, token="secret") as server:
        tab = browser.new_page()
        tab.goto(f"http://127.0.0.1:{server.port}/")
        alert = tab.get_by_role("alert")
        alert.wait_for()
        assert "#token=" in alert.inner_text()
        tab.goto(f"http://127.0.0.1:{server.port}/#token=secret")
        tab.reload()
        tab.locator("#model").get_by_text("tiny").wait_for()
        tab.close()


# Without a browser ----------------------------------------------------------------------------------------------


def test_nothing_comes_from_outside(server: Server) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        answer = server.request("GET", path)
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(kind)
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in policy
        assert "://" not in answer.body.decode()
    html = (FILES / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="([^"]*)"', html) == ["data:,", "page.css", "page.js", "#message"]
    assert not re.search(r"\son\w+=|<style|style=", html)


def test_the_server_alone_has_no_page(model: ECore) -> None:
    with serving(model) as server:
        assert server.request("GET", "/").status == 404
        assert server.request("GET", "/page.js").status == 404


def test_edges_over_http(server: Server, model: ECore) -> None:
    graph = server.request("POST", "/emotions", {"text": SAID[0], "edges": True}).json["graph"]
    seen = model.perceive(SAID[0])
    assert seen.word_edges is not None
    assert graph["words"] == list(seen.words)
    columns = [seen.names.index(name) for name in graph["emotions"]]
    assert [list(map(float, row)) for row in graph["word_edges"]] == [
        pytest.approx(row, rel=1e-5, abs=1e-6) for row in seen.word_edges[:, columns].tolist()
    ]
    assert graph["perceived_after"] == pytest.approx([share for _, share in seen.emotions[:8]])
    assert "graph" not in server.request("POST", "/emotions", {"text": SAID[0]}).json
    assert server.request("POST", "/emotions", {"text": SAID[0], "edges": 1}).status == 400
