"""Open the two pages in a browser: chat and text generation."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from xverse.errors import XverseError
from xverse.verbs._options import ModelOptions

if TYPE_CHECKING:
    from xverse.web.client import Client


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """What `xverse web` takes."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, GGUF file, alias or hub id; the built-in model where none is given."""
    page: Literal["chat", "generate", "both"] = "both"
    """Which page; both stand in tabs."""
    host: str = "127.0.0.1"
    """Address to listen at; any other than this machine's own needs --auth or --insecure."""
    port: int = 36000
    """Port to listen at; 0 takes a free one."""
    lang: Literal["auto", "zh", "en", "ja"] = "auto"
    """Language of the page; auto is what the browser asks for."""
    title: str | None = None
    """What the page calls the model, if not by its own name."""
    auth: str | None = None
    """name:password that the page asks for; $XVERSE_WEB_AUTH keeps it out of the process list."""
    insecure: bool = False
    """Let anybody who reaches this machine use the page, without a password."""
    url: str | None = None
    """Ask this OpenAI-style server (http://host:port/v1) instead of loading a model here; MODEL is
    then one that it lists."""
    api_key: str | None = None
    """Key of that server; $XVERSE_API_KEY keeps it out of the process list."""


def run(config: Config) -> int:
    """Serve the pages until interrupted."""
    from xverse.device import env

    _need_gradio()
    from xverse.web.site import is_loopback, listen, parse_auth, serve

    words = config.auth or env("XVERSE_WEB_AUTH")
    auth = parse_auth(words) if words else None
    if auth is None and not config.insecure and not is_loopback(config.host):
        raise XverseError(
            f"The page would be open to everybody who reaches {config.host}.",
            "It listens beyond this machine, and nothing asks for a password.",
            "Give --auth name:password, or --insecure if that is what you want.",
        )
    with listen(config.host, config.port) as at:
        client = _client(config)
        host, port = at.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        print(f"{client.title} is at http://{name}:{port}/ (Ctrl-C ends it)", flush=True)
        serve(client, at, page=config.page, lang=config.lang, auth=auth)
    return 0


def _client(config: Config) -> "Client":
    if config.url is not None:
        from xverse.device import env
        from xverse.web.http_client import OverHttp

        key = config.api_key or env("XVERSE_API_KEY") or None
        return OverHttp(config.url, config.model, key, config.title)
    if config.api_key is not None:
        raise XverseError(
            "--api-key is of no use here.",
            "It is the key of a server, and the model runs in this process.",
            "Add --url, or leave it out; --auth asks visitors of the page for a password.",
        )
    from xverse.checkpoint.resolve import DEFAULT_MODEL
    from xverse.web.client import InProcess

    return InProcess(config.load(config.model or DEFAULT_MODEL), config.title)


def _need_gradio() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise XverseError(
            "The pages need Gradio.",
            "It is not installed.",
            'Install it with: pip install "xverse-llm[web]"',
        )
