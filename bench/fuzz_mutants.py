"""REQUEST -> HOSTILE REQUEST. What can be done to the body of a request, and to how it is sent."""

import copy
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from bench.fuzz_seeds import TARGETS

Manner = Literal["whole", "half", "leave"]
Headers = tuple[tuple[bytes, bytes], ...]
MAX_BYTES = 8 * 2**20
PLACE = '"\ue000here\ue000"'  # where a value that JSON cannot have goes into a text

# Values that fit no field, or only some, as they stand in a body.
WILD: dict[str, bytes] = {
    "huge int": b"9" * 400,
    "very huge int": b"1" + b"0" * 5000,
    "int64 + 1": b"9223372036854775808",
    "below int64": b"-9223372036854775809",
    "minus one": b"-1",
    "fraction": b"0.5",
    "tiny": b"1e-320",
    "minus zero": b"-0.0",
    "null": b"null",
    "nothing": b"",
    "true": b"true",
    "empty object": b"{}",
    "empty list": b"[]",
    "empty text": b'""',
    "long text": b'"' + b"ab " * 4000 + b'"',
    "special tokens": '"<|endoftext|><|im_start|>Human: \\n\\nAssistant: 😀"'.encode(),
    "odd characters": b'"\\u202e\\ufeff\\u0001\\r\\n\\ufffd\\ud83d\\ude00"',
    "many": b"[" + b",".join([b'"a"'] * 3000) + b"]",
    "nested": b"[" * 40 + b"]" * 40,
}
# What makes any body wrong, wherever it stands.
NEVER: dict[str, bytes] = {
    "null byte": b'"a\\u0000b"',
    "lone surrogate": b'"\\ud800"',
    "raw surrogate": b'"\xed\xa0\x80"',
    "no UTF-8": b'"\xff\xfe"',
    "NaN": b"NaN",
    "Infinity": b"Infinity",
    "minus Infinity": b"-Infinity",
    "1e999": b"1e999",
    "deep list": b"[" * 65 + b"]" * 65,
    "very deep": b"[" * 50_000 + b"]" * 50_000,
    "deep object": b'{"a":' * 65 + b"1" + b"}" * 65,
    "raw control": b'"\x01"',
}


@dataclass(frozen=True)
class Case:
    """One request as bytes, and what is known of its answer.

    `source` says where it comes from. `route` is a path of the OpenAPI document, or None where the
    request is for no route. `expects`: the lowest and highest status that is right.
    """

    source: str
    guide: bool
    method: str
    target: bytes
    route: str | None
    headers: Headers
    body: bytes | None = None
    manner: Manner = "whole"
    expects: tuple[int, int] = (200, 499)
    plain: bool = True  # whether it is proper HTTP, so that the answer has our form and a name

    def wire(self) -> tuple[bytes, bytes]:
        """Head and body as they go over the line."""
        names = {name.lower() for name, _ in self.headers}
        lines = [b"%s %s HTTP/1.1" % (self.method.encode(), self.target)]
        lines += [b"%s: %s" % pair for pair in self.headers]
        if self.body is not None and not names & {b"content-length", b"transfer-encoding"}:
            lines.append(b"content-length: %d" % len(self.body))
        return b"\r\n".join([*lines, b"", b""]), self.body or b""


def as_object(body: bytes | None) -> dict[str, Any] | None:
    """The JSON object that a body is, None where it is none."""
    try:
        asked = json.loads(body or b"")
    except (ValueError, RecursionError):
        return None
    return asked if isinstance(asked, dict) else None


# --- What the body says


def wild(rng: random.Random, base: Case) -> Case:
    """One value replaced by one that fits few fields."""
    return _with_value(rng, base, rng.choice([*WILD]), WILD)


def never(rng: random.Random, base: Case) -> Case:
    """One value replaced by what no body may have."""
    found = _with_value(rng, base, rng.choice([*NEVER]), NEVER)
    return replace(found, expects=(400, 499))


def _with_value(rng: random.Random, base: Case, name: str, values: dict[str, bytes]) -> Case:
    asked = as_object(base.body)
    if asked is None:
        return _sourced(base, values[name], f"whole body: {name}")
    asked = copy.deepcopy(asked)
    places = list(_places(asked)) or [(asked, "prompt")]
    container, key = rng.choice(places)
    container[key] = PLACE.strip('"')
    body = json.dumps(asked, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return _sourced(base, body.replace(PLACE.encode(), values[name]), f"value: {name}")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everywhere in a JSON value where another could stand."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs)[:100]:
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def keys(rng: random.Random, base: Case) -> Case:
    """A field too many, too few, under another name, or twice."""
    asked = as_object(base.body)
    if not asked:
        return _sourced(base, b"{}", "keys: none")
    name = rng.choice([*asked])
    kind = rng.choice(("unknown", "missing", "renamed", "twice", "odd name"))
    if kind == "twice":
        first = json.dumps(name).encode() + b":" + rng.choice([*WILD.values()]) + b","
        return _sourced(base, b"{" + first + json.dumps(asked).encode()[1:], "keys: twice")
    if kind == "missing":
        del asked[name]
    elif kind == "renamed":
        asked[name.upper() + "_"] = asked.pop(name)
    else:
        asked["nothing_like_it" if kind == "unknown" else "\u202e\r\n' \"; ../%00"] = 1
    return _sourced(base, json.dumps(asked).encode(), f"keys: {kind}")


def octets(rng: random.Random, base: Case) -> Case:
    """Bytes of the body cut off, changed, put in, or nothing left of them."""
    body = base.body or b""
    at = rng.randrange(len(body) + 1)
    kinds = {
        "cut": body[:at],
        "changed": body[:at] + bytes([rng.randrange(256)]) + body[at + 1 :],
        "put in": body[:at] + rng.randbytes(4) + body[at:],
        "mark": b"\xef\xbb\xbf" + body,
        "UTF-16": body.decode("utf-8", "replace").encode("utf-16"),
        "two": body + body,
        "list": b"[" + body + b"]",
    }
    name = rng.choice([*kinds])
    return _sourced(base, kinds[name], f"bytes: {name}")


def size(rng: random.Random, base: Case) -> Case:
    """A body of exactly the largest size, filled up with blanks, or of one byte more."""
    body, more = (base.body or b"")[:MAX_BYTES], rng.randrange(2)
    filled = body + b" " * (MAX_BYTES - len(body) + more)
    expects = (401, 413) if more else (200, 412)  # a case may have no key, which is told first
    return replace(_sourced(base, filled, f"size: limit + {more}"), expects=expects)


def _sourced(base: Case, body: bytes, kind: str) -> Case:
    return replace(base, body=body, source=kind)


# --- How it is sent


def method(rng: random.Random, base: Case) -> Case:
    """Another method."""
    known = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE")
    other = rng.choice((*known, "BREW", "post"))
    fits = other == base.method
    return replace(base, method=other, source="http: method", expects=(200 if fits else 400, 499))


def content_type(rng: random.Random, base: Case) -> Case:
    """Another content type, or none."""
    others = (b"", b"text/plain", b"application/x-www-form-urlencoded", b"application/json5")
    kind = rng.choice((*others, b"multipart/form-data; boundary=x", b"application/json,text/plain"))
    head = tuple(pair for pair in base.headers if pair[0] != b"content-type")
    more = ((b"content-type", kind),) if kind else ()
    expects = (400, 499) if base.body is not None else (200, 499)
    return replace(base, headers=(*head, *more), source="http: content type", expects=expects)


def headers(rng: random.Random, base: Case) -> Case:
    """Headers that are wrong, many, long, or twice."""
    kinds: dict[str, tuple[Headers, bool]] = {
        "key": (((b"authorization", b"Bearer \xff\x80wrong"),), True),
        "key twice": (((b"authorization", b"Bearer x"), (b"authorization", b"Basic eA==")), True),
        "host": (((b"x-forwarded-host", b"evil.example"), (b"x-request-id", b"a b\x7f")), True),
        "many": (tuple((b"x-%d" % n, b"1") for n in range(120)), True),
        "long": (((b"x-long", b"a" * 66_000),), True),
        "longer": (((b"x-long", b"a" * 140_000),), False),
        "name": (((b"x bad", b"1"),), False),
        "control": (((b"x-bad", b"a\x00b"),), False),
        "length": (((b"content-length", b"-5"),), False),
        "two lengths": (((b"content-length", b"3"), (b"content-length", b"4")), False),
        "encoding": (((b"transfer-encoding", b"gzip"),), False),
        "upgrade": (((b"connection", b"upgrade"), (b"upgrade", b"websocket")), True),
        "range": (((b"range", b"bytes=0-1"), (b"te", b"trailers"), (b"cookie", b"a=\xff")), True),
    }
    name = rng.choice([*kinds])
    more, plain = kinds[name]
    kept = [pair for pair in base.headers if name[:3] != "key" or pair[0] != b"authorization"]
    return replace(base, headers=(*kept, *more), plain=plain, source=f"header: {name}")


def host(rng: random.Random, base: Case) -> Case:
    """Another name for us."""
    names = (b"evil.example", b"", b"[", b"127.0.0.1.evil.example", b"\xe4\xbd\xa0", b"a:b:c:d")
    head = tuple(pair for pair in base.headers if pair[0] != b"host")
    head = ((b"host", rng.choice(names)), *head)
    return replace(base, headers=head, source="http: host", expects=(400, 421))


def target(rng: random.Random, base: Case) -> Case:
    """Another place."""
    place = rng.choice(TARGETS)
    return replace(base, target=place, route=None, source="http: target", plain=place.isascii())


def half(rng: random.Random, base: Case) -> Case:
    """A body of which a part is sent; then the client is gone."""
    return replace(base, manner="half", source="http: half a body")


def leave(rng: random.Random, base: Case) -> Case:
    """A client that goes when the answer begins."""
    asked = as_object(base.body)
    if asked is not None and "messages" in asked:
        base = _sourced(base, json.dumps({**asked, "stream": True}).encode(), "")
    return replace(base, manner="leave", source="http: left")


def chunked(rng: random.Random, base: Case) -> Case:
    """A body in chunks, whole or broken."""
    body, broken = base.body or b"", rng.random() < 0.5
    sent = b"zz\r\nx" if broken else b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    sent = b"0\r\n\r\n" if not body and not broken else sent
    more = (b"transfer-encoding", b"chunked")
    return replace(
        base, headers=(*base.headers, more), body=sent, plain=not broken, source="http: chunked"
    )


Mutator = Callable[[random.Random, Case], Case]
HTTP: dict[Mutator, float] = {method: 2, headers: 4, host: 1, target: 3}
MUTATORS: dict[Mutator, float] = {
    wild: 26, never: 18, keys: 14, octets: 14, content_type: 3, half: 2, leave: 2, chunked: 3,
    size: 0.05, **HTTP,
}  # fmt: skip


def mutated(rng: random.Random, base: Case) -> Case:
    """The case with one thing changed."""
    kinds = MUTATORS if base.body is not None else HTTP
    mutator: Mutator = rng.choices([*kinds], weights=[*kinds.values()])[0]
    return mutator(rng, replace(base, expects=(200, 499)))
