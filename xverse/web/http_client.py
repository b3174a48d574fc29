"""PAGE -> SERVER. The same questions asked of an OpenAI-style server over HTTP."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import httpx

from xverse.engine.request import Finish, Piece, Sampling
from xverse.errors import XverseError

if TYPE_CHECKING:
    from xverse.checkpoint.load import Checkpoint

# generation_config.json of the published chat models; a server does not tell its own.
PUBLISHED = Sampling(
    max_tokens=2048, temperature=0.5, top_k=30, top_p=0.85, repetition_penalty=1.1
).over({})
CONTEXT = 8192  # where a server does not tell it
# A first token may wait for a long prompt and for others; a server that is alive says so meanwhile.
TIMEOUT = httpx.Timeout(30.0, read=300.0)


class OverHttp:
    """The client of a server at `url` (such as http://127.0.0.1:8000/v1), and of one model of it.

    Without `model` it is the first that the server lists. Raises XverseError where there is none.
    With `served` the server is not asked yet: it is about to start, and calls that `model`.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        key: str | None = None,
        title: str | None = None,
        *,
        served: "Checkpoint | None" = None,
    ) -> None:
        self._key = key
        # trust_env: a proxy of the environment is for the world, and this is a server of ours.
        self._http = httpx.Client(timeout=TIMEOUT, trust_env=False)
        self._url = url.rstrip("/")
        if served is None:
            entry = self._listed(model)
        else:
            entry = {"id": model, "max_model_len": served.shape.context_length}
        self.model = str(entry["id"])
        self.title = title or self.model.rstrip("/").rsplit("/", 1)[-1]
        length = entry.get("max_model_len")
        self.context = length if isinstance(length, int) and length > 1 else CONTEXT
        self.defaults = PUBLISHED if served is None else Sampling().over(served.generation_config)

    def of(self, key: str | None) -> "OverHttp":
        """As `Client` says."""
        if self._key or not key:
            return self
        found = copy.copy(self)
        found._key = key
        return found

    def stream_chat(
        self, messages: Sequence[Mapping[str, str]], sampling: Sampling
    ) -> Iterator[Piece]:
        """As `Client` says."""
        body = {"messages": [dict(message) for message in messages]}
        for choice in self._choices("/chat/completions", body, sampling):
            delta = cast(dict[str, object], choice.get("delta") or {})
            yield _piece(delta.get("content"), choice)

    def stream_text(self, prompt: str, sampling: Sampling) -> Iterator[Piece]:
        """As `Client` says."""
        for choice in self._choices("/completions", {"prompt": prompt}, sampling):
            yield _piece(choice.get("text"), choice)

    def _listed(self, model: str | None) -> dict[str, object]:
        try:
            reply = self._http.get(f"{self._url}/models", headers=self._headers())
            _refuse(reply)
            entries = cast(list[dict[str, object]], reply.json()["data"])
            found = [entry for entry in entries if model is None or entry["id"] == model]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise _no_server(self._url) from error
        if found:
            return found[0]
        raise XverseError(
            f"The server at {self._url} does not serve {model or 'any model'}.",
            f"It lists: {', '.join(str(entry['id']) for entry in entries) or 'nothing'}.",
            "Name one that it lists, or start the server with that model.",
        )

    def _choices(
        self, route: str, body: Mapping[str, object], sampling: Sampling
    ) -> Iterator[dict[str, object]]:
        """First choices of the events that a streaming request is answered with."""
        request = {"model": self.model, "stream": True, **body, **_options(sampling)}
        ended = False
        try:
            headers = self._headers()
            with self._http.stream(
                "POST", self._url + route, json=request, headers=headers
            ) as reply:
                if reply.status_code != 200:
                    reply.read()
                _refuse(reply)
                for line in reply.iter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    ended = ended or data == "[DONE]"
                    if not data or ended:
                        continue
                    event = json.loads(data)
                    if "error" in event:
                        raise _told(event["error"])
                    yield from event.get("choices", [])[:1]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if not ended:
            raise XverseError(
                "The answer broke off.",
                "The server closed the connection before the end.",
                "Ask again; the server's own log tells more.",
            )

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def _unreachable(self, error: httpx.HTTPError) -> XverseError:
        return XverseError(
            f"The server at {self._url} does not answer.",
            str(error) or type(error).__name__,
            "Start it with `xverse serve MODEL`, or correct its address.",
        )


def _options(sampling: Sampling) -> dict[str, object]:
    """What of the sampling the pages set, under the names of the API."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")
    values = {name: getattr(sampling, name) for name in names}
    stop = {"stop": list(sampling.stop)} if sampling.stop else {}
    return {name: value for name, value in values.items() if value is not None} | stop


def _piece(text: object, choice: Mapping[str, object]) -> Piece:
    finish = choice.get("finish_reason")
    known: Finish | None = None if finish is None else "length" if finish == "length" else "stop"
    return Piece(text if isinstance(text, str) else "", (), known)


def _refuse(reply: httpx.Response) -> None:
    if reply.status_code == 200:
        return
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        error = {"message": reply.text[:200]}
    raise _told(error, reply.status_code)


def _told(error: object, status: int | None = None) -> XverseError:
    message = error.get("message") if isinstance(error, dict) else error
    fix = "Give the key of the server." if status == 401 else "Change what was asked."
    return XverseError(
        "The server refused." if status else "The answer broke off.", str(message)[:1000], fix
    )


def _no_server(url: str) -> XverseError:
    return XverseError(
        f"What answers at {url} is no OpenAI-style server.",
        "It does not list its models at /models.",
        "Give the address that ends in /v1.",
    )
