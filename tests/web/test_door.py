"""`serve --web` where a key is asked for: form, cookie, and whose key the pages ask with."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from gradio_client import Client

from tests.server.inside import Inside, Scripted, inside, model_options
from tests.tiny_model import write_published_folder
from xverse.verbs import serve
from xverse.web.door import COOKIE, MAX_FORM

KEYS = ("key-number-one", "key; number=two")
BROWSER = {"accept": "text/html,*/*", "accept-language": "en"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder: Path = tmp_path_factory.mktemp("door") / "XVERSE-Tiny-Chat"
    write_published_folder(folder)
    mount = serve._pages(model_options(folder, keys=KEYS))
    engine = Scripted(lambda _: [75, 104, 3])
    with inside(folder, engine, mount=mount, keys=KEYS) as server:
        yield server


def enter(site: Inside, key: str, **headers: str) -> httpx.Response:
    """What a browser does with the form."""
    return httpx.post(
        f"{site.url}/web/key", data={"key": key}, headers={**BROWSER, **headers}, timeout=60
    )


@pytest.mark.parametrize("path", ["/web", "/web/", "/web/en/", "/web/en/config", "/web/zh/x.js"])
def test_nothing_of_the_pages_is_shown_without_a_key(site: Inside, path: str) -> None:
    shown = httpx.get(site.url + path, headers=BROWSER, timeout=60)
    assert shown.status_code == 401
    assert 'type="password"' in shown.text
    assert "default-src 'none'" in shown.headers["content-security-policy"]
    assert shown.headers["x-request-id"]
    asked = httpx.get(site.url + path, timeout=60)  # a program gets the usual error
    assert asked.status_code == 401
    assert asked.json()["error"]["code"] == "invalid_api_key"


def test_the_form_speaks_the_visitors_language(site: Inside) -> None:
    shown = httpx.get(f"{site.url}/web/", headers={**BROWSER, "accept-language": "ja"}, timeout=60)
    assert "API キー" in shown.text
    assert 'lang="ja"' in shown.text


@pytest.mark.parametrize("key", KEYS)
def test_the_right_key_opens_and_stays_in_the_browser(site: Inside, key: str) -> None:
    entered = enter(site, key)
    assert entered.status_code == 303
    assert entered.headers["location"] == "/web/"
    told = entered.headers["set-cookie"].lower()
    assert "httponly" in told
    assert "samesite=strict" in told
    assert "path=/web" in told
    assert not {"expires", "max-age", "domain", "secure"} & set(told.replace("=", "; ").split("; "))
    with httpx.Client(
        base_url=site.url, headers=BROWSER, follow_redirects=True, timeout=60
    ) as browser:
        browser.cookies.set(COOKIE, entered.cookies[COOKIE], path="/web")
        page = browser.get("/web/")
        assert page.status_code == 200
        assert page.url.path == "/web/en/"
        assert browser.get("/web/en/config").status_code == 200
        # It is for the pages alone: a script elsewhere has to bring the key itself.
        assert (
            browser.get("/v1/models", cookies={COOKIE: entered.cookies[COOKIE]}).status_code == 401
        )


def test_behind_tls_the_cookie_keeps_to_it(site: Inside) -> None:
    assert (
        "secure"
        in enter(site, KEYS[0], origin="https://model.example").headers["set-cookie"].lower()
    )


@pytest.mark.parametrize("key", ["wrong-key", "", "é" * 9, "k" * (MAX_FORM + 1), KEYS[0] + "\n1"])
def test_a_wrong_key_gets_the_form_again(site: Inside, key: str) -> None:
    refused = enter(site, key)
    assert refused.status_code == 401
    assert "set-cookie" not in refused.headers
    assert "does not know that key" in refused.text or not key or len(key) > MAX_FORM


@pytest.mark.parametrize("value", ["", "!", "a", "/w==", "x" * 4000, "4pyT"])
def test_a_broken_cookie_opens_nothing(site: Inside, value: str) -> None:
    headers = {**BROWSER, "cookie": f"{COOKIE}={value}"}
    assert httpx.get(f"{site.url}/web/en/", headers=headers, timeout=60).status_code == 401


def test_a_form_of_another_site_is_not_taken(site: Inside) -> None:
    refused = enter(site, KEYS[0], **{"sec-fetch-site": "cross-site"})
    assert refused.status_code == 401
    assert "set-cookie" not in refused.headers


def test_other_names_are_refused_here_too(site: Inside) -> None:
    assert enter(site, KEYS[0], host="evil.example").status_code == 421


def test_every_route_of_the_app_asks_for_the_key(site: Inside) -> None:
    """All that the app really has, the pages' own and what they bring along too."""
    found = dict.fromkeys(paths(site.app.routes))
    assert {"/v1/chat/completions", "/web/key", "/web/en/config", "/metrics"} <= set(found)
    with httpx.Client(base_url=site.url, timeout=60) as client:
        for path in found:
            for method in ("GET", "POST"):
                answer = client.request(method, path.replace(":path", ""))
                opened = path in ("/health", "/ready")
                assert (answer.status_code == 401) != opened, (method, path, answer.status_code)


def paths(routes: object, before: str = "") -> Iterator[str]:
    """Of all routes, through whatever is mounted."""
    for route in routes:  # type: ignore[attr-defined]
        path = before + getattr(route, "path", "")
        inner = getattr(route, "routes", None)
        if inner:
            yield from paths(inner, path)
        else:
            yield path.replace("{", "").replace("}", "")


def test_the_pages_ask_with_the_key_of_whoever_looks(site: Inside) -> None:
    requests = site.engine.requests  # type: ignore[attr-defined]
    for key in KEYS:
        cookie = f"{COOKIE}={enter(site, key).cookies[COOKIE]}"
        page = Client(
            f"{site.url}/web/en/",
            headers={"cookie": cookie},
            verbose=False,
            analytics_enabled=False,
        )
        shown = page.predict("Hello", api_name="/chat")
        assert [message["role"] for message in shown] == ["user", "assistant"]
    assert len({request.namespace for request in requests[-2:]}) == 2
    text = page.predict("Once", api_name="/generate")
    assert text
    assert requests[-1].namespace == requests[-2].namespace
    log = site.journal.getvalue()
    assert not any(key in log for key in KEYS)


def test_without_keys_there_is_no_form(tmp_path: Path) -> None:
    folder = tmp_path / "XVERSE-Tiny-Chat"
    write_published_folder(folder)
    mount = serve._pages(model_options(folder))
    with inside(folder, Scripted(lambda _: [75, 3]), mount=mount) as site:
        assert httpx.get(f"{site.url}/web/en/", headers=BROWSER, timeout=60).status_code == 200
        assert enter(site, "anything").status_code in (404, 405)


@pytest.mark.browser
def test_in_a_browser(site: Inside) -> None:
    """A wrong key, the right one, a conversation; and no script sees the key."""
    found = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    from tests.web.test_browser import CHROMIUM

    if CHROMIUM is None:
        pytest.skip("no chromium here")
    with found.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(locale="en").new_page()
        page.set_default_timeout(60_000)
        page.goto(f"{site.url}/web/")
        page.get_by_label("API key").fill("not-the-key")
        page.get_by_role("button", name="Enter").click()
        found.expect(page.get_by_role("alert")).to_have_text("This server does not know that key.")
        page.get_by_label("API key").fill(KEYS[1])
        page.get_by_label("API key").press("Enter")
        box = page.locator("#box textarea")
        found.expect(box).to_be_visible(timeout=60_000)
        assert page.url == f"{site.url}/web/en/"
        assert page.evaluate("document.cookie") == ""
        box.fill("Hello")
        box.press("Enter")
        found.expect(page.locator("#talk .bot.message")).to_have_count(1, timeout=60_000)
        found.expect(page.locator("#send")).to_be_visible(timeout=60_000)
        browser.close()
