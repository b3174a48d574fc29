"""MANY MACHINES -> ONE ADDRESS. A Ray Serve application: replicas of our server, and routing.

from ray import serve
from xverse.interop.ray_serve import build_app

serve.run(build_app("xverse/XVERSE-7B-Chat", replicas=2, gpus=1))
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from xverse.errors import XverseError

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.requests import Request
    from starlette.responses import Response

# What concerns one connection only (RFC 9110, 7.6.1), or is written anew for the next.
_OF_THE_CONNECTION = frozenset(
    {"connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer"}
    | {"transfer-encoding", "upgrade", "host", "content-length"}
)
CONNECT_S = 5.0
END_S = 60.0  # for a replica's server to finish what it has, after it was told to end


def build_app(
    model: str,
    *,
    replicas: int = 2,
    name: str | None = None,
    keys: tuple[str, ...] = (),
    gpus: float = 0,
    cpus: float = 1,
    dtype: str = "auto",
    device: str = "auto",
    quantize: int | None = None,
    kv_tokens: int | None = None,
    max_queue: int = 256,
    ready_s: float = 1800.0,
) -> "Application":
    """A Ray Serve application of `replicas` servers of this model, for `serve.run`.

    Each replica takes `gpus` and `cpus` of some machine, loads `model` there (a folder has to be on
    every machine) and has a queue and key limits of its own. Ray sends a request to the less busy
    of two replicas, and starts a new one for one that is lost. XverseError without Ray.
    """
    try:
        from ray import serve
    except ImportError as missing:
        raise XverseError(
            "This needs Ray Serve.", str(missing), 'Run: pip install "xverse-llm[ray,serve]"'
        ) from missing
    if type(replicas) is not int or replicas < 1:
        raise XverseError(
            f"There cannot be {replicas!r:.40} replicas.",
            "Each is a server with a copy of the model.",
            "Give a whole number from 1 on.",
        )
    told = {
        "name": name,
        "keys": list(keys),
        "start": {
            "model": model,
            "dtype": dtype,
            "device": device,
            "quantize": quantize,
            "kv_tokens": kv_tokens,
        },
        "limits": {"max_queue": max_queue},
    }
    deploy = serve.deployment(
        name="xverse",
        num_replicas=replicas,
        ray_actor_options={"num_gpus": gpus, "num_cpus": cpus},
        # Who has to wait waits in our queue, which is fair and says 429 when it is full.
        max_ongoing_requests=2 * max_queue + 64,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=END_S,
    )
    app: Application = deploy(Replica).bind(told, ready_s)
    return app


class Replica:
    """A server in a process of its own, and what hands requests on to it.

    Requests and answers pass as they are: keys, limits, streams and errors are the server's.
    """

    def __init__(self, told: Mapping[str, Any], ready_s: float) -> None:
        self._told, self._ready_s = told, ready_s
        self._process: Process | None = None
        self._begun = asyncio.Lock()
        self._url = ""

    async def check_health(self) -> None:
        """Raises once the server is gone; then Ray replaces this replica."""
        await self._start()
        if self._process is None or self._process.returncode is not None:
            raise RuntimeError("the replica's server has ended")

    async def __call__(self, request: "Request") -> "Response":
        """The server's response to a request."""
        import httpx
        from starlette.responses import JSONResponse, StreamingResponse

        await self._start()
        query = f"?{request.url.query}" if request.url.query else ""
        asked = self._client.build_request(
            request.method,
            f"{request.url.path}{query}",
            headers=_passed(request.headers.items()),
            content=await request.body(),
        )
        try:
            response = await self._client.send(asked, stream=True)
        except httpx.TransportError:
            return JSONResponse(_GONE, 503, {"Retry-After": "1"})
        return StreamingResponse(
            _body(response), response.status_code, dict(_passed(response.headers.items()))
        )

    async def _start(self) -> None:
        """Begin the server, once; XverseError where it does not."""
        async with self._begun:
            if self._process is not None:
                return
            import httpx

            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "xverse.interop.ray_replica", stdin=PIPE, stdout=PIPE
            )
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(self._told).encode() + b"\n")
            line = await asyncio.wait_for(self._process.stdout.readline(), self._ready_s)
            if not line:
                raise _not_begun("Its process ended; the reason is in the replica's log.")
            self._url = json.loads(line)["url"]
            self._client = httpx.AsyncClient(
                base_url=self._url, timeout=httpx.Timeout(None, connect=CONNECT_S), trust_env=False
            )
            await asyncio.wait_for(self._wait_until_ready(), self._ready_s)

    async def _wait_until_ready(self) -> None:
        assert self._process is not None
        while self._process.returncode is None:
            if (await self._client.get("/ready")).status_code == 200:
                return
            await asyncio.sleep(0.1)
        raise _not_begun("Its process ended; the reason is in the replica's log.")


async def _body(response: Any) -> AsyncGenerator[bytes, None]:
    """The bytes of a response as they come. A reader that goes away closes the connection, which is
    how the server hears of it; a server that dies breaks the answer off."""
    try:
        async for part in response.aiter_raw():
            yield part
    finally:
        await response.aclose()


def _passed(headers: Any) -> list[tuple[str, str]]:
    return [(name, value) for name, value in headers if name.lower() not in _OF_THE_CONNECTION]


_GONE = {
    "error": {
        "message": "The replica that had this request is gone. Ask again.",
        "type": "server_error",
        "param": None,
        "code": "replica_gone",
    }
}


def _not_begun(why: str) -> XverseError:
    return XverseError("A replica did not begin.", why, "Mend that, and deploy again.")
