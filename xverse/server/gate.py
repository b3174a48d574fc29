"""EVERY REQUEST -> ITS ROUTE. Names it, checks host, headers and key, counts it, logs it."""

import ipaddress
import re
import socket
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xverse.log import logger
from xverse.server.journal import Journal
from xverse.server.limits import Keys
from xverse.server.metrics import Metrics
from xverse.server.refusals import Refusal, our_failure

OPEN = frozenset({"/health", "/ready"})
MAX_HEADERS = 100
MAX_HEADER_BYTES = 64 * 2**10
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Traffic:
    """How many requests are under way, and whether more are let in."""

    def __init__(self) -> None:
        self.active = 0
        self.draining = False


class Gate:
    """The outermost layer of an app. Plain ASGI, so that streams pass through it untouched."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: Keys,
        hosts: Collection[str],
        traffic: Traffic,
        metrics: Metrics,
        journal: Journal,
    ) -> None:
        """`hosts` are the names in a Host header that are ours, beside localhost and addresses."""
        self.app, self.keys, self.traffic = app, keys, traffic
        self.metrics, self.journal = metrics, journal
        self.hosts = {host.lower() for host in hosts} | {"localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer why not."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route speaks WebSocket
            await send({"type": "websocket.close", "code": 1008})
            return
        began = time.perf_counter()
        headers = dict(scope["headers"])
        name = _request_id(headers.get(b"x-request-id", b""))
        state = scope.setdefault("state", {})
        state["facts"] = {}
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", name.encode()),
                ]
            await send(message)

        self.traffic.active += 1
        try:
            self._check(scope, headers)
            await self.app(scope, receive, named)
        except Refusal as refusal:
            state["facts"]["error"] = refusal.code or str(refusal.status)
            await refusal.response()(scope, receive, named)
        except Exception:
            logger.exception("request %s failed", name)
            if not status:
                await our_failure().response()(scope, receive, named)
        finally:
            self.traffic.active -= 1
            self._note(scope, name, status, time.perf_counter() - began)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Refusal where the request may not come in; whose it is goes into the scope's state."""
        size = sum(len(key) + len(value) for key, value in scope["headers"])
        if len(scope["headers"]) > MAX_HEADERS or size > MAX_HEADER_BYTES:
            raise Refusal(
                431,
                f"There may be {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes together.",
                code="headers_too_large",
            )
        host = headers.get(b"host", b"").decode("latin-1")
        if not self._ours(host):
            raise Refusal(
                421,
                f"This server is not {host[:100]!r}; --allowed-hosts names what it is.",
                code="unknown_host",
            )
        if scope["path"] in OPEN:
            return
        authorization = headers.get(b"authorization", b"").decode("latin-1")
        scope["state"]["tenant"] = self.keys.tenant(authorization or None)

    def _ours(self, host: str) -> bool:
        """Whether a Host header means us. An address always does: only names can be rebound."""
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _note(self, scope: Scope, name: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        state = scope["state"]
        facts = state["facts"]
        if code := facts.get("error"):
            self.metrics.rejected(code)
        self.metrics.http(route, status)
        tenant = state.get("tenant")
        self.journal.write(
            "request",
            id=name,
            method=scope["method"][:16],
            route=route,
            status=status or 499,  # nothing was sent: the client had gone
            ms=round(seconds * 1000, 1),
            key=tenant.name if tenant else None,
            **facts,
        )


def _request_id(given: bytes) -> str:
    """The client's own name for the request where it is a plain one, else a new one."""
    text = given.decode("latin-1")
    return text if _ID.fullmatch(text) else f"req_{uuid.uuid4().hex}"
