"""BROWSER -> PAGE. Which language answers, and what a page may do: nothing beyond this server."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xverse.web.words import negotiate

# The model's words are shown as Markdown, and a picture in them would tell its address to the
# world; with this nothing is fetched from anywhere else. Gradio's own scripts stand in its page.
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Front:
    """Stands before the pages at `path`: each language has its own below it, such as /zh.

    What names no language goes to the one that Accept-Language asks for: a visitor of the bare
    address by a redirect, anything else (a client of the API) as it is.
    """

    def __init__(
        self, app: ASGIApp, *, path: str, languages: tuple[str, ...], others: tuple[str, ...] = ()
    ) -> None:
        """`others` are places below `path` that are of no language."""
        self.app, self.path, self.languages = app, path.rstrip("/"), languages
        self._known = {*languages, *others}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        asked = str(scope.get("path", ""))
        if scope["type"] != "http" or not f"{asked}/".startswith(f"{self.path}/"):
            await self.app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        rest = asked[len(self.path) :].lstrip("/")
        if rest.split("/")[0] in self._known:
            await self.app(scope, receive, send_safely)
            return
        language = self._language(Headers(scope=scope).get("accept-language", ""))
        if not rest and scope["method"] in ("GET", "HEAD"):
            await _redirect(f"{scope.get('root_path', '')}{self.path}/{language}/", send_safely)
            return
        path = f"{self.path}/{language}/{rest}"
        scope = {**scope, "path": path, "raw_path": path.encode()}
        await self.app(scope, receive, send_safely)

    def _language(self, accept_language: str) -> str:
        wished = negotiate(accept_language)
        return wished if wished in self.languages else self.languages[0]


async def _redirect(place: str, send: Send) -> None:
    headers = [(b"location", place.encode()), (b"vary", b"Accept-Language")]
    await send({"type": "http.response.start", "status": 307, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
