"""WHAT A SERVER IS TOLD. All options of serving, and which of them cannot be together."""

import ipaddress
import math
from dataclasses import dataclass, field
from pathlib import Path

from xverse.errors import XverseError
from xverse.server.limits import Shares
from xverse.server.messages import Start


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """How to serve the model of `start`. Keys are plain text here, and nowhere later.

    `name` is what clients call the model. A port of 0 is chosen by the system; `guide_port` None
    leaves the published FastAPI service out. At most `max_queue` requests wait, and of them all at
    most `max_queue_tokens` prompt tokens. On SIGTERM, what was accepted has `drain_s` to end.
    Adapters in folders below `adapters_dir` can be loaded and unloaded over HTTP, with the
    `admin_key` where there are keys; without that folder nothing of the kind can be done.
    """

    start: Start
    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    guide_port: int | None = None
    keys: tuple[str, ...] = ()
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    shares: Shares = field(default_factory=Shares)
    max_queue: int = 256
    max_queue_tokens: int = 1_000_000
    max_choices: int = 16
    drain_s: float = 30.0
    log_requests: bool = True
    log_prompts: bool = False
    adapters_dir: Path | None = None
    admin_key: str | None = None

    def __post_init__(self) -> None:
        for name in ("port", "guide_port"):
            port = getattr(self, name)
            if port is not None and not 0 <= port <= 65535:
                raise XverseError(
                    f"{name} cannot be {port}.",
                    "Ports go from 1 to 65535; 0 lets the system choose.",
                    "Give such a number.",
                )
        if self.log_prompts and not self.log_requests:
            raise XverseError(
                "Prompts cannot be logged where requests are not.",
                "They stand in the lines of the requests.",
                "Leave one of --log-prompts and --no-log-requests out.",
            )
        if self.port == self.guide_port and self.port:
            raise XverseError(
                f"Two services cannot both listen on port {self.port}.",
                "The published FastAPI service has a port of its own.",
                "Give another --guide-port.",
            )
        numbers = {
            "max_queue": (self.max_queue, 0, 1_000_000),
            "max_queue_tokens": (self.max_queue_tokens, 1, 2**40),
            "max_choices": (self.max_choices, 1, 128),
            "drain_seconds": (self.drain_s, 0, 86400),
            "requests_per_minute": (self.shares.requests_per_minute, 1, 10**9),
            "tokens_per_minute": (self.shares.tokens_per_minute, 1, 10**12),
            "concurrency": (self.shares.concurrency, 1, 10**6),
        }
        for name, (value, low, high) in numbers.items():
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise XverseError(
                    f"{name} cannot be {value}.",
                    f"It is a number from {low} to {high}.",
                    "Give such a number, or leave it out.",
                )
        if not 1 <= len(self.name) <= 200:
            raise XverseError(
                f"The model cannot be called {self.name!r:.60}.",
                "Names of models have 1 to 200 characters.",
                "Give another --served-model-name.",
            )
        self._check_adapters()
        every = (*self.keys, *filter(None, [self.admin_key]))
        if any(not key.isascii() or not key.isprintable() or len(key) < 8 for key in every):
            raise XverseError(
                "One of the API keys cannot be used.",
                "A key has at least 8 printable ASCII characters.",
                "Make one, for example with: openssl rand -hex 24",
            )
        if self.public and not self.closed and not self.insecure:
            raise XverseError(
                f"{self.host} can be reached from other machines, and there is no API key.",
                "Whoever reaches the port could use the model.",
                "Give --api-key KEY (or XVERSE_API_KEY), or --insecure if that is meant so.",
            )

    def _check_adapters(self) -> None:
        for name in self.start.adapters:
            if not 1 <= len(name) <= 200 or not name.isprintable() or name == self.name:
                raise XverseError(
                    f"An adapter cannot be called {name!r:.60}.",
                    "Clients ask for it as a model: 1 to 200 printable characters, and not the "
                    "name of the model itself.",
                    "Give another name, as in --adapter NAME=FOLDER.",
                )
        if self.adapters_dir is not None and not self.adapters_dir.is_dir():
            raise XverseError(
                f"{self.adapters_dir} is no folder.",
                "Adapters are to be loaded from folders in it.",
                "Name an existing folder, or leave --adapters-dir out.",
            )
        open_to_all = not self.keys and not self.public
        if self.adapters_dir is not None and not open_to_all and self.admin_key is None:
            raise XverseError(
                "Nobody could load an adapter.",
                "Where keys are asked for, or others reach the port, only the admin's key may "
                "change what is served, and there is none.",
                "Give --admin-key KEY (or XVERSE_ADMIN_KEY), or leave --adapters-dir out.",
            )
        if self.admin_key is not None and self.adapters_dir is None:
            raise XverseError(
                "The admin key opens nothing.",
                "It is for loading adapters, and no folder of them is named.",
                "Give --adapters-dir FOLDER, or leave --admin-key out.",
            )

    @property
    def closed(self) -> bool:
        """Whether a key is asked for."""
        return bool(self.keys) or self.admin_key is not None

    @property
    def public(self) -> bool:
        """Whether other machines may reach it."""
        if self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True  # a name: whatever it means today, it may mean something else tomorrow
