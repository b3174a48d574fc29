"""The pages in a real browser: what people press and see."""

import os
import re
import shutil
from collections.abc import Iterator

import pytest

from tests.web.live import WORDS, Echo, eventually

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, expect, sync_playwright  # noqa: E402

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = os.environ.get("XVERSE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no chromium here (apt install chromium, or set XVERSE_CHROMIUM)"
    ),
]


expect.set_options(timeout=30_000)  # four tabs on two busy cores


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as driver:
        # A container's root has no sandbox to start, and the pages are our own.
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


class Tab:
    """One tab on the pages."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.requests = page, list[str]()
        page.set_default_timeout(20_000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(address)
        self.box = page.locator("#box textarea")
        self.send, self.stop = page.locator("#send"), page.locator("#stop")
        self.answers = page.locator("#talk .bot.message")
        self.questions = page.locator("#talk .user.message")
        expect(self.box).to_be_visible(timeout=20_000)

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def answered(self, text: str) -> None:
        expect(self.answers.last).to_contain_text(text, timeout=20_000)
        expect(self.send).to_be_visible(timeout=20_000)


def open_tab(browser: Browser, address: str, language: str = "en", width: int = 1100) -> Tab:
    """One context for all tabs, so that they share a cache; a page is a session of its own."""
    context = browser.contexts[0] if browser.contexts else browser.new_context()
    page = context.new_page()
    page.set_viewport_size({"width": width, "height": 800})
    page.set_extra_http_headers({"Accept-Language": language})
    return Tab(page, address)


@pytest.fixture
def tab(browser: Browser, address: str) -> Iterator[Tab]:
    opened = open_tab(browser, address)
    yield opened
    opened.page.close()


def test_enter_and_the_button_send(tab: Tab) -> None:
    tab.say("Hello")
    tab.answered("[user:Hello] w0 w1")
    expect(tab.box).to_have_value("")
    tab.box.fill("And?")
    tab.send.click()
    tab.answered("[user:And?] w0 w1")
    expect(tab.box).to_have_value("")
    expect(tab.questions).to_have_count(2)
    tab.box.press("Shift+Enter")
    expect(tab.box).to_have_value("\n")
    expect(tab.questions).to_have_count(2)


def test_an_answer_is_seen_growing_and_stops(tab: Tab, echo: Echo) -> None:
    tab.say("slowly")
    expect(tab.answers.last).to_contain_text("w5")
    expect(tab.stop).to_be_visible()
    expect(tab.send).to_be_hidden()
    assert f"w{WORDS - 1}" not in tab.answers.last.inner_text()
    expect(tab.answers.last).to_contain_text("w12")
    tab.stop.click()
    expect(tab.send).to_be_visible()
    eventually(lambda: echo.open == 0)
    stopped = tab.answers.last.inner_text()
    assert f"w{WORDS - 1}" not in stopped
    tab.say("And?")
    tab.answered("[user:And?]")
    assert isinstance(echo.asked[-1], list)
    kept = str(echo.asked[-1][1]["content"])  # what was said until then stays said
    assert "w12" in kept
    assert f"w{WORDS - 1}" not in kept


def test_a_second_message_waits_its_turn(tab: Tab) -> None:
    tab.say("slowly")
    expect(tab.answers.last).to_contain_text("w3")
    tab.say("too soon")
    expect(tab.page.get_by_text("still being written")).to_be_visible()
    expect(tab.box).to_have_value("too soon")
    tab.stop.click()
    expect(tab.questions).to_have_count(1)


def test_reset_empties_page_and_state(tab: Tab, echo: Echo) -> None:
    tab.say("Hello")
    tab.answered("w1")
    tab.box.fill("half a thought")
    tab.page.locator("#reset").click()
    expect(tab.questions).to_have_count(0)
    expect(tab.box).to_have_value("")
    tab.say("Anew")
    tab.answered("[user:Anew] w0 w1")
    assert echo.asked[-1] == [{"role": "user", "content": "Anew"}]


def test_reset_in_the_middle_of_an_answer(tab: Tab, echo: Echo) -> None:
    tab.say("slowly")
    expect(tab.answers.last).to_contain_text("w3")
    tab.page.locator("#reset").click()
    eventually(lambda: echo.open == 0)
    expect(tab.send).to_be_visible()
    tab.page.wait_for_timeout(300)  # nothing comes back after it
    expect(tab.questions).to_have_count(0)
    tab.say("Anew")
    tab.answered("[user:Anew] w0 w1")
    assert echo.asked[-1] == [{"role": "user", "content": "Anew"}]


def test_regenerate(tab: Tab, echo: Echo) -> None:
    tab.say("Hello")
    tab.answered("w1")
    tab.say("Again")
    tab.answered("[user:Again]")
    before, asked = len(echo.asked), echo.asked[-1]
    tab.page.get_by_role("button", name=re.compile("retry|regenerate", re.I)).last.click()
    eventually(lambda: len(echo.asked) == before + 1)
    tab.answered("[user:Again]")
    assert echo.asked[-1] == asked
    expect(tab.questions).to_have_count(2)
    expect(tab.answers).to_have_count(2)


def test_edit(tab: Tab, echo: Echo) -> None:
    tab.say("Hello")
    tab.answered("w1")
    tab.say("Second")
    tab.answered("[user:Second]")
    tab.page.get_by_role("button", name="Edit").first.click()
    written = tab.page.locator("#talk textarea")
    written.fill("Goodbye")
    tab.page.get_by_role("button", name="Submit").click()
    tab.answered("[user:Goodbye] w0 w1")
    expect(tab.questions).to_have_count(1)
    assert echo.asked[-1] == [{"role": "user", "content": "Goodbye"}]


def test_system_and_exec_under_advanced_settings(tab: Tab, echo: Echo) -> None:
    expect(tab.page.locator("#system textarea")).to_be_hidden()
    tab.page.get_by_text("Advanced settings").click()
    tab.page.locator("#system textarea").fill("You are.")
    tab.say("Hello")
    tab.answered("[system:You are.][user:Hello]")
    tab.page.locator("#system textarea").fill("Another.")
    tab.page.locator("#exec textarea").fill('{"rooms": 2}')
    tab.send.click()
    tab.answered('[exec:{"rooms": 2}] w0 w1')
    roles = [message["role"] for message in echo.asked[-1] if isinstance(message, dict)]
    assert roles == ["system", "user", "assistant", "exec"]
    assert "Another" not in str(echo.asked[-1])
    expect(tab.page.locator("#exec textarea")).to_have_value("")


def test_what_cannot_be_answered_comes_back(tab: Tab) -> None:
    tab.say("refused")
    expect(tab.page.get_by_text("It said <so>")).to_be_visible()
    expect(tab.box).to_have_value("refused")
    expect(tab.questions).to_have_count(0)
    expect(tab.send).to_be_visible()


def test_an_example_is_sent(tab: Tab) -> None:
    tab.page.locator("#talk .example").first.click()
    tab.answered("w1")
    expect(tab.questions.first).to_contain_text("lighthouse")


def test_four_sessions_do_not_mix(browser: Browser, address: str) -> None:
    tabs = {name: open_tab(browser, address) for name in ("Anna", "Bela", "Cora", "Dora")}
    for name, tab in tabs.items():
        tab.say(f"{name} slowly")
    for tab in tabs.values():  # all four are being answered at once
        expect(tab.answers.last).to_contain_text("w3")
        expect(tab.stop).to_be_visible()
    for tab in tabs.values():
        tab.stop.dispatch_event("click")  # it moves while the answer above it grows
    for name, tab in tabs.items():
        expect(tab.send).to_be_visible()
        tab.say(f"{name} again")
    for name, tab in tabs.items():
        tab.answered(f"[user:{name} again] w0 w1")
        expect(tab.questions).to_have_count(2)
        said = tab.page.locator("#talk").inner_text()
        assert f"[user:{name} slowly]" in said
        assert not any(other in said for other in tabs if other != name)
        tab.page.close()


def test_a_closed_tab_ends_its_answer(browser: Browser, address: str, echo: Echo) -> None:
    tab = open_tab(browser, address)
    tab.say("slowly")
    expect(tab.answers.last).to_contain_text("w3")
    tab.page.close()
    eventually(lambda: echo.open == 0, seconds=30)  # whole, it would take 60 s


def test_the_browser_chooses_the_language(browser: Browser, address: str) -> None:
    tab = open_tab(browser, address, "zh-CN,zh;q=0.9")
    expect(tab.send).to_have_text("发送")
    expect(tab.page.get_by_role("tab").first).to_have_text("对话")
    tab.page.get_by_role("link", name="日本語").click()
    expect(tab.send).to_have_text("送信")
    tab.page.close()


def test_text_generation(tab: Tab, echo: Echo) -> None:
    tab.page.get_by_role("tab", name="Text generation").click()
    tab.page.locator("#prompt textarea").fill("Once slowly")
    tab.page.locator("#generate").click()
    written = tab.page.locator("#written textarea")
    expect(written).to_have_value(re.compile(r"^<Once slowly> w0.* w5"))
    tab.page.locator("#halt").click()
    expect(tab.page.locator("#generate")).to_be_visible()
    eventually(lambda: echo.open == 0)
    assert f"w{WORDS - 1}" not in written.input_value()
    tab.page.locator("#clear").click()
    expect(written).to_have_value("")
    expect(tab.page.locator("#prompt textarea")).to_have_value("")
    limits = [
        (each.get_attribute("min"), each.get_attribute("max"), each.input_value())
        for each in tab.page.locator("input[type=range]:visible").all()
    ]
    published = [("1", "512", "100"), ("0", "1", "1"), ("0", "50", "50"), ("0", "1", "0.92")]
    assert limits == published


def test_phone_width(browser: Browser, address: str) -> None:
    tab = open_tab(browser, address, width=360)
    for name in ("Chat", "Text generation"):
        tab.page.get_by_role("tab", name=name).click()
        tab.page.wait_for_timeout(100)
        wide = tab.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, name
    tab.page.get_by_role("tab", name="Chat").click()
    tab.say("Hello " * 40)
    tab.answered("w1")
    for each in (tab.box, tab.send, tab.page.locator("#reset"), tab.answers.last):
        place = each.bounding_box()
        assert place is not None
        assert place["x"] >= 0
        assert place["x"] + place["width"] <= 360
    tab.page.close()


def test_nothing_is_fetched_from_elsewhere(tab: Tab, address: str) -> None:
    tab.say("![a](http://198.51.100.7/seen.png) <img src=http://198.51.100.7/two.png>")
    tab.answered("w1")
    tab.page.get_by_role("tab", name="Text generation").click()
    tab.page.wait_for_timeout(300)
    answered = [url for url in tab.requests if not url.startswith((address, "data:", "blob:"))]
    # The policy stops a picture in an answer before anything is sent; the attempt is still listed.
    assert all("198.51.100.7" in url for url in answered), answered
    loaded = tab.page.evaluate(
        "[...document.images].filter(image => image.naturalWidth > 0).map(image => image.src)"
    )
    assert not any("198.51.100.7" in source for source in loaded)
