"""Both clients of the pages: the model in this process, and a server over HTTP."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.tiny_model import GENERATION, write_published_folder
from xverse import LLM, XverseError
from xverse.engine.request import Piece, Sampling
from xverse.web.client import InProcess, paced
from xverse.web.http_client import OverHttp

HELLO = [{"role": "user", "content": "Hello"}]


def event(**delta: object) -> str:
    return "data: " + json.dumps({"choices": [delta]}) + "\n\n"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = tmp_path_factory.mktemp("model") / "XVERSE-Tiny-Chat"
    write_published_folder(folder)
    return LLM(folder)


def test_in_process_says_what_the_model_says(llm: LLM) -> None:
    client = InProcess(llm)
    assert client.title == "XVERSE-Tiny-Chat"
    assert InProcess(llm, "Mine").title == "Mine"
    assert client.context == 256
    assert client.defaults.temperature == GENERATION["temperature"]
    assert client.defaults.repetition_penalty == GENERATION["repetition_penalty"]
    greedy = Sampling(max_tokens=8, temperature=0.0)
    pieces = list(client.stream_chat(HELLO, greedy))
    assert "".join(piece.text for piece in pieces) == llm.chat(HELLO, greedy).text
    pieces = list(client.stream_text("Hello", greedy))
    assert "".join(piece.text for piece in pieces) == llm.generate("Hello", greedy).text


def test_an_answer_that_is_left_gives_its_memory_back(llm: LLM) -> None:
    before = llm.engine.pages.available
    long = Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)
    pieces = paced(InProcess(llm).stream_chat(HELLO, long))
    next(pieces)
    assert llm.engine.pages.available < before
    pieces.close()
    assert llm.engine.pages.available == before


def test_pieces_come_whole_and_not_too_often() -> None:
    def fast() -> Iterator[Piece]:
        for number in range(1000):
            yield Piece(f"{number} ", (number,))
        yield Piece("end", (), "length")

    pieces = list(paced(fast()))
    assert "".join(piece.text for piece in pieces) == "".join(f"{n} " for n in range(1000)) + "end"
    assert len(pieces) < 100
    assert pieces[0].text == "0 "  # the first is shown at once
    assert pieces[-1].finish == "length"
    assert [piece.text for piece in paced(iter([Piece("a", ()), Piece("b", ())]))] == ["a", "b"]


@contextmanager
def server(
    stream: str, *, status: int = 200, models: object = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server that answers every question with this stream; gives its address and what came."""
    asked: list[dict[str, Any]] = []
    listed = {"data": [{"id": "xverse/Tiny", "max_model_len": 4096}, {"id": "other"}]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({"path": self.path, "key": self.headers.get("Authorization")})
            self.reply(200, json.dumps(listed if models is None else models))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append({"path": self.path, **json.loads(body)})
            self.reply(status, stream)

        def reply(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1/", asked
    finally:
        running.shutdown()
        running.server_close()


CHAT = (
    ": keep-alive\n\n"
    + event(delta={"role": "assistant", "content": ""}, finish_reason=None)
    + event(delta={"content": "你"}, finish_reason=None)
    + event(delta={"content": "好"}, finish_reason="length")
    + 'data: {"choices": [], "usage": {}}\n\ndata: [DONE]\n\n'
)


def test_a_chat_over_http() -> None:
    with server(CHAT) as (url, asked):
        client = OverHttp(url, key="k")
        assert (client.title, client.model, client.context) == ("Tiny", "xverse/Tiny", 4096)
        sampling = Sampling(max_tokens=9, temperature=0.0, top_k=0, top_p=1.0)
        pieces = list(client.stream_chat([{"role": "exec", "content": "{}"}], sampling))
    assert "".join(piece.text for piece in pieces) == "你好"
    assert pieces[-1].finish == "length"
    assert asked[0] == {"path": "/v1/models", "key": "Bearer k"}
    assert asked[1] == {
        "path": "/v1/chat/completions",
        "model": "xverse/Tiny",
        "stream": True,
        "messages": [{"role": "exec", "content": "{}"}],
        "max_tokens": 9,
        "temperature": 0.0,
        "top_k": 0,
        "top_p": 1.0,
    }


def test_a_text_over_http() -> None:
    stream = event(text=" upon", finish_reason=None) + event(text="", finish_reason="stop")
    with server(stream + "data: [DONE]\n\n") as (url, asked):
        client = OverHttp(url, "other", title="Mine")
        pieces = list(client.stream_text("Once", Sampling(max_tokens=1)))
        assert (client.title, client.context) == ("Mine", 8192)
    assert [piece.text for piece in pieces] == [" upon", ""]
    assert pieces[-1].finish == "stop"
    assert (asked[1]["path"], asked[1]["prompt"]) == ("/v1/completions", "Once")
    assert asked[1]["model"] == "other"


@pytest.mark.parametrize(
    ("stream", "status", "words"),
    [
        (CHAT.replace("data: [DONE]", ""), 200, "closed the connection"),
        ('data: {"error": {"message": "engine restarted"}}\n\n', 200, "engine restarted"),
        ('{"error": {"message": "prompt has 9 tokens"}}', 400, "prompt has 9 tokens"),
        ("<html>busy</html>", 503, "busy"),
        ("", 401, "key"),
    ],
)
def test_what_goes_wrong_is_told(stream: str, status: int, words: str) -> None:
    with server(stream, status=status) as (url, _):
        client = OverHttp(url)
        with pytest.raises(XverseError, match=words):
            list(client.stream_chat(HELLO, Sampling()))


@pytest.mark.parametrize("models", [{"data": []}, {"no": 1}, [], {"data": [{"id": "another"}]}])
def test_a_server_without_that_model(models: object) -> None:
    with (
        server("", models=models) as (url, _),
        pytest.raises(XverseError, match=r"does not serve|no OpenAI"),
    ):
        OverHttp(url, "wanted")


def test_nobody_is_there() -> None:
    with pytest.raises(XverseError, match="does not answer"):
        OverHttp("http://127.0.0.1:9/v1")
