"""What stands before the pages: languages, headers, and leaving others alone."""

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from xverse.web.front import Front


def client(path: str) -> TestClient:
    async def tell(request: Request) -> PlainTextResponse:
        return PlainTextResponse(request.url.path)

    app = Starlette(routes=[Route("/{rest:path}", tell, methods=["GET", "POST"])])
    app.add_middleware(Front, path=path, languages=("en", "zh", "ja"))
    return TestClient(app, follow_redirects=False)


@pytest.mark.parametrize(("path", "root"), [("/", "/"), ("/web", "/web"), ("/web", "/web/")])
def test_a_visitor_is_sent_to_their_language(path: str, root: str) -> None:
    reply = client(path).get(root, headers={"Accept-Language": "ja,en;q=0.5"})
    assert reply.status_code == 307
    assert reply.headers["location"] == f"{path.rstrip('/')}/ja/"
    assert reply.headers["vary"] == "Accept-Language"


def test_what_names_no_language_goes_to_one() -> None:
    ask = client("/web")
    chinese = {"Accept-Language": "zh-CN"}
    assert ask.get("/web/config", headers=chinese).text == "/web/zh/config"
    assert ask.post("/web/gradio_api/queue/join").text == "/web/en/gradio_api/queue/join"
    assert ask.get("/web/ja/config", headers=chinese).text == "/web/ja/config"
    assert ask.get("/web/jam/config", headers=chinese).text == "/web/zh/jam/config"


@pytest.mark.parametrize("other", ["/", "/v1/models", "/website", "/en/"])
def test_other_paths_are_not_touched(other: str) -> None:
    reply = client("/web").get(other, headers={"Accept-Language": "ja"})
    assert reply.text == other
    assert "content-security-policy" not in reply.headers


def test_pages_may_fetch_nothing_from_elsewhere() -> None:
    for path in ("/", "/config", "/zh/"):
        policy = client("/").get(path).headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "http" not in policy
