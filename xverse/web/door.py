"""COOKIE -> KEY. Visitors of the pages write their API key once; their browser alone keeps it."""

import asyncio
import html
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from urllib.parse import parse_qs

from starlette.datastructures import Headers
from starlette.requests import Request, cookie_parser
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xverse.web.words import LANGUAGES, Words, negotiate

NAME = "key"  # of the form's field, and of its address below the pages
COOKIE = "xverse_key"
MAX_FORM = 4096  # bytes
FORM_S = 10.0
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)


class Door:
    """Stands before all that asks for a key. Below `path`, a key that comes as a cookie or in the
    form goes on as the header that programs send; nothing is let in here. Where a browser is
    refused for want of a key (401), what it gets is the form.

    The cookie ends with the browser's session, no script reads it, and it is sent to `path` alone,
    never along with a request that another site began.
    """

    def __init__(self, app: ASGIApp, *, path: str) -> None:
        self.app, self.path = app, path.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        asked = str(scope.get("path", ""))
        if scope["type"] != "http" or not f"{asked}/".startswith(f"{self.path}/"):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = _cookie_key(headers)
        if scope["method"] == "POST" and asked == f"{self.path}/{NAME}" and _same_site(headers):
            key, receive = await _form_key(receive), _nothing
        if key is not None and "authorization" not in headers:
            name = (b"authorization", b"Bearer " + key.encode("latin-1", "replace"))
            scope = {**scope, "headers": [*scope["headers"], name]}
        if "text/html" in headers.get("accept", ""):
            words = LANGUAGES[negotiate(headers.get("accept-language", ""))]
            send = _form_for_401(send, f"{self.path}/{NAME}", words, wrong=bool(key))
        await self.app(scope, receive, send)


async def take(request: Request) -> Response:
    """POST of the form, behind the check of its key: the browser is told to keep it."""
    root = request.url.path.rsplit("/", 1)[0]
    answer = RedirectResponse(f"{root}/", 303)
    key = visitor_key(request.headers)
    if key is not None:
        secure = request.headers.get("origin", "").startswith("https://")
        value = urlsafe_b64encode(key.encode()).decode().rstrip("=")
        answer.set_cookie(COOKIE, value, path=root, httponly=True, samesite="strict", secure=secure)
    return answer


def visitor_key(headers: Mapping[str, str]) -> str | None:
    """The key that a request came with, None where it has none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() or None if scheme.lower() == "bearer" else None


def _cookie_key(headers: Headers) -> str | None:
    value = cookie_parser(headers.get("cookie", "")).get(COOKIE)
    if not value:
        return None
    try:
        return urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode("ascii")
    except ValueError:
        return None  # somebody else's cookie, or a broken one: it opens nothing


def _same_site(headers: Headers) -> bool:
    """Whether the form is ours, as far as the browser tells."""
    return headers.get("sec-fetch-site", "same-origin") in ("same-origin", "none")


async def _form_key(receive: Receive) -> str | None:
    """The key in the form that is being sent; None where there is none of a sound length."""
    data = b""
    try:
        async with asyncio.timeout(FORM_S):
            while len(data) <= MAX_FORM:
                message = await receive()
                data += message.get("body", b"")
                if not message.get("more_body"):
                    break
    except TimeoutError:
        return None
    if len(data) > MAX_FORM:
        return None
    found = parse_qs(data.decode("latin-1")).get(NAME, [""])
    return found[0].strip() or None


async def _nothing() -> Message:
    """In the place of a body that has been read."""
    return {"type": "http.request", "body": b"", "more_body": False}


def _form_for_401(send: Send, target: str, words: Words, *, wrong: bool) -> Send:
    """Exchanges the body of a 401 for the form; any other answer passes."""
    refused = False

    async def exchange(message: Message) -> None:
        nonlocal refused
        if message["type"] == "http.response.start" and message["status"] == 401:
            refused = True
            page = _form(target, words, wrong=wrong).encode()
            kept = [
                pair
                for pair in message["headers"]
                if pair[0].lower() not in (b"content-type", b"content-length")
            ]
            more = [
                (b"content-type", b"text/html; charset=utf-8"),
                (b"content-length", str(len(page)).encode()),
                (b"content-security-policy", POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
                (b"cache-control", b"no-store"),
            ]
            await send({**message, "headers": [*kept, *more]})
            await send({"type": "http.response.body", "body": page, "more_body": False})
        elif not refused:
            await send(message)

    return exchange


def _form(target: str, words: Words, *, wrong: bool) -> str:
    """The page that asks for a key; it needs nothing but itself."""
    said = html.escape(words.key_wrong if wrong else words.key_kept)
    return f"""<!doctype html>
<html lang="{words.tag}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>XVERSE</title>
<style>{STYLE}</style>
</head>
<body>
<form method="post" action="{html.escape(target)}">
<h1>XVERSE</h1>
<label for="key">{html.escape(words.key)}</label>
<input id="key" name="{NAME}" type="password" autocomplete="current-password" required autofocus>
<p{' class="wrong" role="alert"' if wrong else ""}>{said}</p>
<button>{html.escape(words.enter)}</button>
</form>
</body>
</html>
"""


STYLE = """
:root { color-scheme: light dark; }
body { margin: 0; min-height: 100vh; display: grid; place-items: center;
  font-family: system-ui, -apple-system, "Segoe UI", "PingFang SC", "Microsoft YaHei", sans-serif;
  background: light-dark(#f8fafc, #0b0f19); color: light-dark(#1f2937, #f3f4f6); }
form { width: min(22rem, 88vw); display: grid; gap: .7rem; padding: 2rem; border-radius: 1rem;
  box-sizing: border-box; background: light-dark(#fff, #111827);
  border: 1px solid light-dark(#e5e7eb, #374151); }
h1 { margin: 0 0 .4rem; font-size: 1.25rem; letter-spacing: .12em; color: transparent;
  background: linear-gradient(90deg, #2563eb, #7c3aed 60%, #db2777) 0 / 8rem;
  -webkit-background-clip: text; background-clip: text; }
label { font-weight: 600; }
input { font: inherit; padding: .6rem .7rem; border-radius: .55rem;
  border: 1px solid light-dark(#d1d5db, #4b5563); background: transparent; color: inherit; }
p { margin: 0; font-size: .85rem; opacity: .75; }
p.wrong { opacity: 1; color: light-dark(#b91c1c, #fca5a5); }
button { font: inherit; font-weight: 600; padding: .6rem; border: 0; border-radius: .55rem;
  background: #2563eb; color: #fff; cursor: pointer; }
"""
