"""Serve a model over HTTP: OpenAI-style API, and on request the published service and web pages."""

import sys
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from xverse.device import env
from xverse.errors import XverseError
from xverse.verbs._options import ModelOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI
    from starlette.types import ASGIApp

    from xverse.checkpoint.load import Checkpoint
    from xverse.server.messages import Ready
    from xverse.server.options import ServeOptions
    from xverse.server.run import Listening, Mount


PAGES = "/web"  # where the pages are, beside the API


@dataclass(frozen=True, kw_only=True)
class Config(ModelOptions):
    """What `xverse serve` takes."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """Folder, GGUF file, alias or hub id; the built-in model where none is given."""
    host: str = "127.0.0.1"
    """Address to listen at. One that others can reach needs a key."""
    port: int = 8000
    """Port to listen at; 0 takes a free one."""
    served_model_name: str | None = None
    """What clients call the model; its own name by default."""
    api_key: tuple[str, ...] = ()
    """Keys that are let in; the environment variable XVERSE_API_KEY adds one."""
    api_keys_file: Path | None = None
    """File with one key a line."""
    insecure: bool = False
    """Listen at a public address without a key."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names this server goes by; addresses, localhost and the machine's name always are."""
    kv_tokens: int | None = None
    """Room for keys and values, in tokens of all requests together; by default by the machine."""
    max_queue: int = 256
    """Requests that may wait; more are refused with 429."""
    max_queue_tokens: int = 1_000_000
    """Prompt tokens that may wait."""
    max_choices: int = 16
    """Largest n that a request may ask for, at most 128."""
    requests_per_minute: int | None = None
    """Requests that each key has a minute."""
    tokens_per_minute: int | None = None
    """Tokens, read and written, that each key has a minute."""
    concurrency: int | None = None
    """Answers that each key may have made at once."""
    adapter: tuple[str, ...] = ()
    """LoRA adapters (PEFT folders) to load, each as NAME=FOLDER; clients name them as the model."""
    adapters_dir: Path | None = None
    """Let adapters in folders below this one be loaded and unloaded over HTTP."""
    admin_key: str | None = None
    """The key that may do so, where keys are asked for; or by the variable XVERSE_ADMIN_KEY."""
    max_adapters: int | None = None
    """Adapters loaded at once; by default those given, and 8 with --adapters-dir."""
    adapter_mb: int = 1024
    """Memory for all adapters together, in MiB."""
    adapter_slots: int | None = None
    """Adapters in captured steps at once, on a GPU; by default max-adapters + 1, at most 8."""
    adapter_rank: int = 32
    """The largest rank of those; memory is taken for it at the start."""
    drain_seconds: float = 30.0
    """After SIGTERM, how long answers may go on that have begun."""
    guide_api: bool = False
    """Also answer POST / as the published FastAPI service does, at a port of its own."""
    guide_port: int = 6006
    """Port of the published service."""
    web: bool = False
    """Also serve the web pages, at /web; visitors are asked for a key where there are keys."""
    log_requests: bool = True
    """Write one JSON line a request to standard error."""
    log_prompts: bool = False
    """Write into that line what the request asked, its prompt and all."""

    def options(self) -> "ServeOptions":
        """As the server takes them."""
        from xverse.checkpoint.resolve import DEFAULT_MODEL, title_of
        from xverse.server.limits import Shares, read_keys
        from xverse.server.messages import Start
        from xverse.server.options import ServeOptions

        model = self.model or DEFAULT_MODEL
        keys = [*self.api_key, *filter(None, [env("XVERSE_API_KEY")])]
        if self.api_keys_file is not None:
            keys += read_keys(self.api_keys_file)
        admin_key = self.admin_key
        if admin_key is None and self.adapters_dir is not None:
            admin_key = env("XVERSE_ADMIN_KEY")
        given = _named_folders(self.adapter)
        least = len(given) if self.adapters_dir is None else max(8, len(given))
        return ServeOptions(
            start=Start(
                model=model,
                dtype=self.dtype,
                device=self.device,
                quantize=self.quantize,
                kv_tokens=self.kv_tokens,
                kv_dtype=self.kv_dtype,
                tensor_parallel=self.tensor_parallel,
                speculate=self.speculate,
                host_embedding=self.host_embedding,
                adapters=given,
                max_adapters=least if self.max_adapters is None else self.max_adapters,
                adapter_bytes=self.adapter_mb * 2**20,
                adapter_slots=self.adapter_slots,
                adapter_rank=self.adapter_rank,
            ),
            name=self.served_model_name or title_of(model),
            host=self.host,
            port=self.port,
            guide_port=self.guide_port if self.guide_api else None,
            keys=tuple(keys),
            insecure=self.insecure,
            allowed_hosts=self.allowed_hosts,
            shares=Shares(self.requests_per_minute, self.tokens_per_minute, self.concurrency),
            max_queue=self.max_queue,
            max_queue_tokens=self.max_queue_tokens,
            max_choices=self.max_choices,
            drain_s=self.drain_seconds,
            log_requests=self.log_requests,
            log_prompts=self.log_prompts,
            adapters_dir=self.adapters_dir,
            admin_key=admin_key or None,
        )


def run(config: Config) -> int:
    """Serve until SIGTERM or Ctrl-C; those who are being answered are answered first."""
    _require("fastapi", "uvicorn", "msgspec", "prometheus_client")
    from xverse.server.run import serve

    options = config.options()
    mount = _pages(options) if config.web else None
    if options.public and not options.closed:
        print(
            f"warning: {options.host} can be reached from other machines, and no key is asked for.",
            file=sys.stderr,
        )
    words = _Words(options)
    serve(options, mount=mount, listening=words.listening, ready=words.ready)
    return 0


class _Words:
    """What the person at the terminal is told."""

    def __init__(self, options: "ServeOptions") -> None:
        self._options = options
        self._next = ""

    def listening(self, where: "Listening") -> None:
        """The port is open; the model may still be loading."""
        print(f"{self._options.name}: listening at {where.url}", flush=True)
        if where.guide_url:
            print(f"the published service: POST {where.guide_url}/", flush=True)
        key = ' -H "Authorization: Bearer $XVERSE_API_KEY"' if self._options.closed else ""
        messages = '[{"role": "user", "content": "你好"}]'
        body = f'{{"model": "{self._options.name}", "messages": {messages}}}'
        self._next = (
            f"next: curl {where.url}/v1/chat/completions{key} "
            f"-H 'Content-Type: application/json' -d '{body}'"
        )

    def ready(self, told: "Ready") -> None:
        """The model is loaded, for the first time or again."""
        print(
            f"ready on {told.device}: {told.context:,} tokens of context, room for "
            f"{told.capacity:,} tokens in all",
            flush=True,
        )
        print(self._next, flush=True)


def _named_folders(given: tuple[str, ...]) -> dict[str, str]:
    """NAME=FOLDER, each, by their names."""
    found: dict[str, str] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not (name and equals and folder) or name in found:
            raise XverseError(
                f"--adapter {each!r:.100} cannot be read.",
                "It names an adapter and its folder, each name once.",
                "Write it as in: --adapter poems=adapters/poems",
            )
        found[name] = folder
    return found


def _require(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise XverseError(
            "The server cannot run here.",
            f"It needs {', '.join(missing)}, which the base installation leaves out.",
            'Install them with: pip install "xverse-llm[serve]"',
        )


def _pages(options: "ServeOptions") -> "Mount":
    if find_spec("gradio") is None:
        raise XverseError(
            "There are no web pages here.",
            "They need Gradio, which the base installation leaves out.",
            'Install it with: pip install "xverse-llm[web]", or leave --web out.',
        )
    from xverse.web.door import Door
    from xverse.web.http_client import OverHttp
    from xverse.web.site import mount

    def pages(app: "FastAPI", url: str, served: "Checkpoint") -> "Callable[[ASGIApp], ASGIApp]":
        client = OverHttp(f"{url}/v1", options.name, served=served)
        mount(app, client, path=PAGES, keys=options.closed)
        return partial(Door, path=PAGES) if options.closed else lambda gate: gate

    return pages
