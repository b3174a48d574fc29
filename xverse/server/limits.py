"""KEYS -> SHARES. Who may ask, how often, how much at once; and who is next."""

import hashlib
import hmac
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from xverse.errors import XverseError
from xverse.server.refusals import Refusal


class Bucket:
    """A budget of `per_minute` that refills steadily; what was spent beyond it is owed."""

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock, self._level, self._then = clock, per_minute, clock()

    def wait_s(self, least: float) -> float:
        """How long until there is so much; 0 where there is."""
        now = self._clock()
        gained = (now - self._then) * self.per_minute / 60
        self._level, self._then = min(self.per_minute, self._level + gained), now
        return max(0.0, (min(least, self.per_minute) - self._level) * 60 / self.per_minute)

    def spend(self, amount: float) -> None:
        """Take so much, even where it is not there."""
        self._level -= amount


@dataclass(frozen=True)
class Shares:
    """What each key may have; None is without limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(eq=False)
class Tenant:
    """Whoever has one key. `namespace` is its hash: KV pages are shared only within it. An `admin`
    may change which adapters there are."""

    namespace: str
    shares: Shares
    admin: bool = False
    active: int = 0
    requests: Bucket | None = field(init=False)
    tokens: Bucket | None = field(init=False)

    def __post_init__(self) -> None:
        per_minute = self.shares.requests_per_minute
        self.requests = None if per_minute is None else Bucket(per_minute)
        tokens = self.shares.tokens_per_minute
        self.tokens = None if tokens is None else Bucket(tokens)

    @property
    def name(self) -> str:
        """What logs call it: the beginning of the key's hash."""
        return self.namespace[:12] or "anonymous"

    def count_request(self) -> None:
        """One more request; Refusal where the minute has had its share."""
        if self.requests is None:
            return
        if wait_s := self.requests.wait_s(1):
            raise _too_many("requests per minute", self.shares.requests_per_minute, wait_s)
        self.requests.spend(1)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Within this, one answer more is being made; Refusal where there are too many."""
        most = self.shares.concurrency
        if most is not None and self.active >= most:
            raise _too_many("requests at once", most, 1)
        if self.tokens is not None and (wait_s := self.tokens.wait_s(1)):
            raise _too_many("tokens per minute", self.shares.tokens_per_minute, wait_s)
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def spend_tokens(self, count: int) -> None:
        """So many tokens were read or written for it."""
        if self.tokens is not None:
            self.tokens.spend(count)


class Keys:
    """All keys, by their hashes alone. Without any, everybody is one tenant, and an admin."""

    def __init__(self, keys: Collection[str], shares: Shares, admin: str | None = None) -> None:
        """`admin` is a key like the others, and an admin's."""
        self._tenants = [
            (_hash(key), Tenant(_hash(key).hex(), shares, admin=key == admin))
            for key in {*keys} | ({admin} if admin is not None else set())
        ]
        self._everybody = Tenant("", shares, admin=True)

    @property
    def asked(self) -> bool:
        """Whether a key is needed."""
        return bool(self._tenants)

    def tenant(self, authorization: str | None) -> Tenant:
        """Whose key this is, "Bearer KEY"; Refusal (401) where it is nobody's.

        Every known key is compared, and whole, so that time tells nothing.
        """
        if not self._tenants:
            return self._everybody
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip())
        found = [tenant for known, tenant in self._tenants if hmac.compare_digest(known, given)]
        if scheme.lower() != "bearer" or not found:
            raise Refusal(
                401,
                "An API key is needed, as in: Authorization: Bearer KEY."
                if not key
                else "This API key is not known here.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found[0]


def read_keys(file: Path) -> list[str]:
    """The keys in a file, one a line; empty lines and those that begin with # say nothing."""
    try:
        lines = file.expanduser().read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise XverseError(
            f"The file of API keys {str(file)!r} cannot be read.",
            str(error),
            "Give a text file with one key a line.",
        ) from error
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise XverseError(
            f"The file {str(file)!r} has no API key in it.",
            "Without one, everybody would be let in.",
            "Write one key a line into it, or leave --api-keys-file out.",
        )
    return keys


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _too_many(what: str, most: int | None, wait_s: float) -> Refusal:
    return Refusal(
        429,
        f"This key may have {most} {what}.",
        code="rate_limit_exceeded",
        retry_after_s=min(wait_s, 60),
    )


def overloaded(why: str, wait_s: float) -> Refusal:
    """The queue is full for everybody."""
    return Refusal(
        429, f"Too many requests wait already: {why}.", code="overloaded", retry_after_s=wait_s
    )
