"""PAGES -> APP. The pages in each language as one web application, mounted or served alone."""

import html
import socket
from typing import Literal, get_args

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from xverse.errors import XverseError
from xverse.web import door
from xverse.web.chat_page import ChatPage
from xverse.web.client import Client
from xverse.web.front import Front
from xverse.web.generation_page import GenerationPage
from xverse.web.look import CSS, FLIP, theme
from xverse.web.sessions import Sessions
from xverse.web.words import FALLBACK, LANGUAGES

Page = Literal["chat", "generate", "both"]
Lang = Literal["auto", "zh", "en", "ja"]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Each answer being streamed holds a thread while it waits for its next piece.
ANSWERS_AT_ONCE = 128
WAITING = 512  # answers that may wait for one of those threads; more are told to come back


def blocks(client: Client, *, page: Page, lang: str, languages: tuple[str, ...]) -> gr.Blocks:
    """The page, or both in tabs, in one language, with links to the other `languages`."""
    words, sessions = LANGUAGES[lang], Sessions()
    with gr.Blocks(
        title=client.title, fill_height=True, fill_width=True, analytics_enabled=False
    ) as built:
        gr.HTML(_top(client.title, lang, languages), padding=False, elem_id="top")
        with gr.Column(elem_classes="page" if page == "both" else "page solo", scale=1):
            if page == "chat":
                ChatPage(client, words, sessions).build()
            elif page == "generate":
                GenerationPage(client, words, sessions).build()
            else:
                with gr.Tab(words.chat, scale=1):
                    ChatPage(client, words, sessions).build()
                with gr.Tab(words.generation):
                    GenerationPage(client, words, sessions).build()
    built.max_threads = ANSWERS_AT_ONCE
    return built.queue(max_size=WAITING, default_concurrency_limit=None)


def mount(
    app: FastAPI,
    client: Client,
    *,
    path: str = "/web",
    page: Page = "both",
    lang: Lang = "auto",
    auth: tuple[str, str] | None = None,
    keys: bool = False,
) -> None:
    """Put the pages into an application, at `path` and below it.

    With `auth`, a name and a password, they ask for these; with `keys` the application stands
    behind a `Door`. Requests outside of `path` are not touched. To be called before the application
    starts.
    """
    languages = tuple(LANGUAGES) if lang == "auto" else (lang,)
    for language in languages:
        built = blocks(client, page=page, lang=language, languages=languages)
        gr.mount_gradio_app(
            app,
            built,
            path=f"{path.rstrip('/')}/{language}",
            auth=auth,
            theme=theme(),
            css=CSS,
            footer_links=[],
            run_history=False,
            show_error=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size=1,  # the pages take no files
        )
        # A browser opens six connections to a server, for all its tabs. Each answer takes one; a
        # heartbeat would take another of every tab, and four tabs would wait for each other.
        built.config["connect_heartbeat"] = False
    first = tuple(sorted(languages, key=lambda language: language != FALLBACK))
    if keys:
        place = f"{path.rstrip('/')}/{door.NAME}"
        app.add_api_route(place, door.take, methods=["POST"], include_in_schema=False)
    app.add_middleware(Front, path=path, languages=first, others=(door.NAME,) if keys else ())


def serve(
    client: Client,
    at: socket.socket,
    *,
    page: Page = "both",
    lang: Lang = "auto",
    auth: tuple[str, str] | None = None,
) -> None:
    """Serve the pages at a socket from `listen`, until interrupted."""
    server(client, at, page=page, lang=lang, auth=auth).run(sockets=[at])


def server(
    client: Client,
    at: socket.socket,
    *,
    page: Page = "both",
    lang: Lang = "auto",
    auth: tuple[str, str] | None = None,
) -> uvicorn.Server:
    """What `serve` runs."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount(app, client, path="/", page=page, lang=lang, auth=auth)
    host, port = at.getsockname()[:2]
    if is_loopback(host):
        # A page of the web must not reach this one under a name of its own (DNS rebinding).
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    config = uvicorn.Config(
        app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=3
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0 takes a free one. Raises XverseError where that is
    taken, so that it is known before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise XverseError(
            f"The pages cannot listen at {host}, port {port}: {reason.lower()}.",
            "Another program may have that port, perhaps an earlier run of this one.",
            "Choose another port with --port, or stop that program.",
        ) from error
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    return host in LOOPBACK or host.startswith("127.")


def parse_auth(text: str) -> tuple[str, str]:
    """A name and a password from "name:password". Raises XverseError where one is missing."""
    name, _, password = text.partition(":")
    if not name or not password:
        raise XverseError(
            "--auth has no name or no password.",
            "Both are asked for on the page.",
            "Write it as name:password.",
        )
    return name, password


def _top(title: str, lang: str, languages: tuple[str, ...]) -> str:
    """The bar above the page: whose it is, its languages, light and dark."""
    links = "".join(
        f'<a href="../{each}/" lang="{each}"{" aria-current" * (each == lang)}>'
        f"{LANGUAGES[each].language}</a>"
        for each in languages
        if len(languages) > 1
    )
    flip = f'<button type="button" title="{LANGUAGES[lang].flip}" onclick="{FLIP}">◐</button>'
    return (
        f'<div class="bar"><span class="mark">XVERSE</span>'
        f'<span class="model">{html.escape(title)}</span>'
        f'<span class="right">{links}{flip}</span></div>'
    )


assert {"auto", *LANGUAGES} == {*get_args(Lang)}
