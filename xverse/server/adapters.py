"""FOLDERS -> ADAPTERS SERVED. POST /v1/load_lora_adapter and unload, named as vLLM names them.

Only an admin may, and only what lies below the one folder that the operator has named.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from xverse.server.context import Context
from xverse.server.link import EngineGoneError, Link
from xverse.server.refusals import Refusal, engine_restarted, invalid, json_response, not_ready
from xverse.server.schema import Name, Strict
from xverse.server.service import Service, mended


class LoadAdapterRequest(Strict):
    """POST /v1/load_lora_adapter. `lora_path` is a folder below the server's --adapters-dir;
    with `load_inplace` a name that is taken means the new adapter from then on."""

    lora_name: Annotated[Name, Field(min_length=1)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(Strict):
    """POST /v1/unload_lora_adapter. Who is being answered with it is answered to the end."""

    lora_name: Name


async def load(context: Context, asked: LoadAdapterRequest) -> Response:
    """Load an adapter; once it is answered, requests may name it as their model."""
    service, name = context.service, asked.lora_name
    folder = _folder(_require_admin(context), asked.lora_path)
    if not name.isprintable() or name == service.name:
        raise invalid(f"An adapter cannot be called {name!r:.100}.", "lora_name")
    async with service.models.changing:
        if name in service.models.adapters and not asked.load_inplace:
            raise invalid(
                f"There is an adapter {name!r:.100} already; unload it, or ask for load_inplace.",
                "lora_name",
                "adapter_exists",
            )
        with mended("lora_path"):
            found = await run_in_threadpool(service.models.look_at, folder)
            await _adapt(service, name, str(folder), replace=asked.load_inplace)
        service.models.adapters[name] = found
        service.supervisor.keep_adapters(service.models.folders)
    return json_response({"status": "loaded"})


async def unload(context: Context, asked: UnloadAdapterRequest) -> Response:
    """Forget an adapter."""
    service, name = context.service, asked.lora_name
    _require_admin(context)
    async with service.models.changing:
        if name not in service.models.adapters:
            raise Refusal(
                404,
                f"There is no adapter {name!r:.100}.",
                param="lora_name",
                code="adapter_not_found",
            )
        entry = service.models.adapters.pop(name)  # from now on nobody is sent to it
        try:
            with mended("lora_name"):
                await _adapt(service, name, None)
        except Refusal:
            service.models.adapters[name] = entry
            raise
        service.supervisor.keep_adapters(service.models.folders)
    return json_response({"status": "unloaded"})


async def _adapt(service: Service, name: str, folder: str | None, *, replace: bool = False) -> None:
    link: Link | None = service.supervisor.link
    if link is None:
        raise not_ready(service.supervisor.state)
    try:
        await link.adapt(name, folder, replace=replace)
    except EngineGoneError as error:
        raise engine_restarted() from error


def _require_admin(context: Context) -> Path:
    """The folder of adapters; Refusal (403) where none may be loaded, or not by this key."""
    root = context.service.models.adapters_dir
    if root is None:
        why = "The adapters of this server are fixed: it was started without --adapters-dir."
        raise Refusal(403, why, code="adapters_fixed")
    if not context.tenant.admin:
        raise Refusal(403, "Only the admin key may change adapters.", code="admin_key_needed")
    return root


def _folder(root: Path, path: str) -> Path:
    """The folder meant; Refusal where it is not below the root, whether there is one or not."""
    try:
        here = root.resolve()
        folder = (here / path).resolve()  # through links, and wherever .. leads
        inside = folder != here and folder.is_relative_to(here)
    except (OSError, ValueError, RuntimeError):
        inside = False
    if not inside:
        raise invalid("lora_path leads to no folder below --adapters-dir.", "lora_path")
    return folder
