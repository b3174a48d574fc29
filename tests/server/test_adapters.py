"""Adapters over HTTP: asked for as models, changed under load by who may, and by nobody else."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from tests.checkpoint.adapters import merge, random_adapter
from tests.server.inside import Inside, Scripted, inside
from tests.server.served import serve, wait
from xverse.checkpoint.adapter import CONFIG, Adapter, write_adapter
from xverse.checkpoint.load import load
from xverse.engine.llm import LLM
from xverse.engine.output import Output
from xverse.engine.request import Sampling
from xverse.engine.simple import decode
from xverse.errors import XverseError
from xverse.server.messages import Start
from xverse.server.options import ServeOptions

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
KEY, ADMIN = "key-number-one", "key-of-the-admin"
PROMPTS = ["Hello", "The 1 and 2", "Tell me (now), please: is it so?"]
GREEDY: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "repetition_penalty": 1.0}
SWAPS = 10


@pytest.fixture(scope="module")
def adapters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    shape = load(folder, dtype="float32").decoder.shape
    return {
        "a": random_adapter(shape, seed=1, size=0.15, chat_format="v3"),
        "b": random_adapter(shape, seed=2, size=0.15, targets=("q_proj", "down_proj")),
    }


@pytest.fixture(scope="module")
def root(adapters: dict[str, Adapter], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of adapters, and beside it one that nobody may load."""
    path = tmp_path_factory.mktemp("adapters")
    for name, adapter in adapters.items():
        write_adapter(path / "allowed" / name, adapter)
    write_adapter(path / "secret", adapters["a"])
    (path / "allowed" / "link").symlink_to(path / "secret")
    return path / "allowed"


@pytest.fixture(scope="module")
def expected(folder: Path, adapters: dict[str, Adapter]) -> dict[str, list[str]]:
    """What the plain decoder says to each prompt, with merged weights."""
    sampling = Sampling(ignore_eos=True, **GREEDY)
    found = {}
    for name, adapter in {"tiny": None, **adapters}.items():
        model = load(folder, dtype="float32")
        if adapter is not None:
            merge(model.decoder, adapter)
        filled = sampling.over(model.checkpoint.generation_config)
        texts = []
        for prompt in PROMPTS:
            ids = model.tokenizer.encode(prompt)
            output = Output(model.tokenizer, filled, ids)
            for token in decode(model.decoder, [ids], [filled]):
                output.take(token)
            texts.append(output.answer().text)
        found[name] = texts
    assert len({tuple(texts) for texts in found.values()}) == 3
    return found


@pytest.fixture(scope="module")
def server(folder: Path, root: Path) -> Iterator[Inside]:
    llm = LLM(folder, dtype="float32", max_adapters=2, share_prefixes=True)
    with inside(folder, llm.engine, adapters_dir=root) as found:
        yield found


@pytest.fixture
def http(server: Inside) -> Iterator[httpx.Client]:
    """A client, and no adapter loaded when it comes and when it goes."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        for name in models(client)[1:]:
            assert client.post(UNLOAD, json={"lora_name": name}).status_code == 200


def models(client: httpx.Client) -> list[str]:
    return [model["id"] for model in client.get("/v1/models").json()["data"]]


def put(client: httpx.Client, name: str, path: str, **more: object) -> httpx.Response:
    return client.post(LOAD, json={"lora_name": name, "lora_path": path, **more})


def answer(client: httpx.Client, model: str, prompt: str) -> httpx.Response:
    asked = {"model": model, "prompt": prompt, "ignore_eos": True, **GREEDY}
    return client.post("/v1/completions", json=asked)


def text(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    said: str = reply.json()["choices"][0]["text"]
    return said


def test_ten_swaps_under_load(http: httpx.Client, expected: dict[str, list[str]]) -> None:
    """One name changes hands between steps, another stays, the model itself answers beside them."""
    assert put(http, "now", "a").status_code == 200
    assert put(http, "always", "b").status_code == 200
    swapped, done = 0, threading.Event()
    served: list[tuple[str, int, int, int, httpx.Response]] = []

    def ask(worker: int) -> None:
        turn = worker
        with httpx.Client(base_url=http.base_url, timeout=60) as client:
            while not done.is_set():
                place, model = turn % len(PROMPTS), ("now", "always", "now", "tiny")[turn % 4]
                before = swapped
                reply = answer(client, model, PROMPTS[place])
                served.append((model, place, before, swapped, reply))
                turn += 1

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(ask, worker) for worker in range(4)]
        try:
            for turn in range(SWAPS):
                seen = len(served)
                while len(served) < seen + 4 and not any(worker.done() for worker in workers):
                    done.wait(0.01)
                reply = put(http, "now", "ba"[turn % 2], load_inplace=True)
                assert reply.status_code == 200, reply.text
                swapped += 1
        finally:
            done.set()
        for worker in workers:
            worker.result()
    of_swapped = set()
    for model, place, before, after, reply in served:
        found = text(reply)
        if model != "now":
            assert found == expected["b" if model == "always" else "tiny"][place]
            continue
        # After an even number of swaps it is a; the one under way may already be done.
        possible = {"ab"[count % 2] for count in range(before, after + 2)}
        assert found in {expected[name][place] for name in possible}
        of_swapped.add(found)
    assert {model for model, *_ in served} == {"now", "always", "tiny"}
    assert of_swapped & {*expected["a"]}
    assert of_swapped & {*expected["b"]}
    # After the dust has settled it is a's turn, by the last swap.
    assert text(answer(http, "now", PROMPTS[0])) == expected["a"][0]


def test_an_adapter_is_a_model(http: httpx.Client, expected: dict[str, list[str]]) -> None:
    assert put(http, "a", "a").json() == {"status": "loaded"}
    assert models(http) == ["tiny", "a"]
    told = http.get("/v1/models/a").json()
    assert (told["parent"], told["id"]) == ("tiny", "a")
    base, mine = (answer(http, name, PROMPTS[0]).json() for name in ("tiny", "a"))
    assert mine["model"] == "a"
    assert mine["choices"][0]["text"] == expected["a"][0]
    assert mine["system_fingerprint"] != base["system_fingerprint"]
    messages = [{"role": "user", "content": "Hello"}]
    prompts = {
        name: http.post("/render", json={"model": name, "messages": messages}).json()["prompt"]
        for name in ("tiny", "a")
    }
    assert prompts["tiny"].startswith("Human: ")  # v2
    assert prompts["a"].startswith("user: ")  # v3, as the adapter was trained
    for path, body in {
        "/v1/chat/completions": {"messages": messages, **GREEDY},
        "/v1/responses": {"input": "Hello", "temperature": 0, "max_output_tokens": 8},
        "/v1/decisions": {"messages": messages, "decision": {"type": "predicate"}},
    }.items():
        replies = [http.post(path, json={"model": name, **body}) for name in ("tiny", "a")]
        assert [reply.status_code for reply in replies] == [200, 200], replies[1].text
        assert [reply.json()["model"] for reply in replies] == ["tiny", "a"]
        parts = [{k: v for k, v in r.json().items() if k in SAID} for r in replies]
        parts = json.loads(json.dumps(parts), object_hook=without_ids)
        assert parts[0] != parts[1]
    assert http.post(UNLOAD, json={"lora_name": "a"}).json() == {"status": "unloaded"}
    assert models(http) == ["tiny"]
    assert answer(http, "a", "Hello").status_code == 404


SAID = {"choices", "output", "labels"}


def without_ids(part: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in part.items() if name != "id"}


@pytest.mark.parametrize(
    "path",
    ["../secret", "link", "/", ".", "a/../../secret", "a\0b", "x" * 4000, "~", "", "{outside}"],
)
def test_nothing_outside_the_folder_is_touched(http: httpx.Client, root: Path, path: str) -> None:
    reply = put(http, "x", path.replace("{outside}", str(root.parent / "secret")))
    assert reply.status_code == 400, reply.text
    assert str(root.parent / "secret") not in reply.text
    assert models(http) == ["tiny"]


def test_whether_something_is_outside_is_not_told(http: httpx.Client) -> None:
    there, not_there = put(http, "x", "../secret"), put(http, "x", "../nothing")
    assert there.json() == not_there.json()


def test_an_absolute_path_inside_is_as_good(http: httpx.Client, root: Path) -> None:
    assert put(http, "a", str(root / "a")).status_code == 200


def test_what_cannot_be_loaded_is_said_and_harms_nobody(
    http: httpx.Client, root: Path, expected: dict[str, list[str]]
) -> None:
    for damage in ("no config", "nan", "not a model's"):
        folder = root / "damaged"
        shutil.copytree(root / "a", folder)
        if damage == "no config":
            (folder / CONFIG).unlink()
        else:
            config = json.loads((folder / CONFIG).read_text())
            change = {"lora_alpha": -1} if damage == "nan" else {"target_modules": ["nobody"]}
            (folder / CONFIG).write_text(json.dumps({**config, **change}))
        reply = put(http, "x", "damaged")
        assert reply.status_code == 400, reply.text
        shutil.rmtree(folder)
    assert put(http, "a", "a").status_code == 200
    assert put(http, "a", "b").json()["error"]["code"] == "adapter_exists"
    assert put(http, "tiny", "b").status_code == 400
    assert put(http, "b", "b").status_code == 200
    assert "may be 2" in put(http, "c", "b").json()["error"]["message"]
    assert http.post(UNLOAD, json={"lora_name": "c"}).status_code == 404
    assert models(http) == ["tiny", "a", "b"]
    assert text(answer(http, "b", PROMPTS[1])) == expected["b"][1]


def test_only_the_admin_changes_adapters(folder: Path, root: Path) -> None:
    engine = Scripted(lambda _: [75, 3])
    asked = {"lora_name": "a", "lora_path": "../secret"}
    with inside(folder, engine, keys=(KEY,), adapters_dir=root, admin_key=ADMIN) as server:
        for key, status in ((None, 401), ("wrong-key", 401), (KEY, 403), (ADMIN, 400)):
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            for path, body in ((LOAD, asked), (UNLOAD, {"lora_name": "a"})):
                reply = httpx.post(server.url + path, json=body, headers=headers, timeout=60)
                wanted = 404 if (status, path) == (400, UNLOAD) else status
                assert reply.status_code == wanted, reply.text
        headers = {"authorization": f"Bearer {ADMIN}"}
        chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
        url = f"{server.url}/v1/chat/completions"
        assert httpx.post(url, json=chat, headers=headers, timeout=60).status_code == 200


def test_without_a_folder_nothing_can_be_loaded(folder: Path) -> None:
    with inside(folder, Scripted(lambda _: [75, 3])) as server:
        for path, body in (
            (LOAD, {"lora_name": "a", "lora_path": "a"}),
            (UNLOAD, {"lora_name": "a"}),
        ):
            reply = httpx.post(server.url + path, json=body, timeout=60)
            assert reply.status_code == 403
            assert reply.json()["error"]["code"] == "adapters_fixed"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keys": (KEY,)}, "Nobody could load"),
        ({"host": "0.0.0.0", "insecure": True}, "Nobody could load"),
        ({"adapters_dir": Path("/nonexistent")}, "is no folder"),
        ({"adapters_dir": None, "admin_key": ADMIN}, "opens nothing"),
        ({"admin_key": "short"}, "cannot be used"),
        ({"start": Start(model="m", adapters={"m": "x"})}, "cannot be called"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str, root: Path) -> None:
    told = {"start": Start(model="m"), "name": "m", "adapters_dir": root} | options
    with pytest.raises(XverseError, match=says):
        ServeOptions(**told)


def test_a_new_engine_has_the_adapters_of_the_old(
    folder: Path, root: Path, expected: dict[str, list[str]]
) -> None:
    flags = ["--dtype", "float32", "--served-model-name", "tiny", "--no-log-requests"]
    flags += ["--adapter", f"first={root / 'a'}", "--adapters-dir", str(root)]
    with (
        serve(str(folder), *flags) as served,
        httpx.Client(base_url=served.url, timeout=60) as client,
    ):
        wait(served.ready)
        assert put(client, "second", "b").status_code == 200
        assert put(client, "third", "b").status_code == 200
        assert client.post(UNLOAD, json={"lora_name": "third"}).status_code == 200
        old = served.engine()
        assert old is not None
        os.kill(old, signal.SIGKILL)
        wait(lambda: served.engine() not in (None, old) and served.ready())
        assert models(client) == ["tiny", "first", "second"]
        for name, adapter in (("tiny", "tiny"), ("first", "a"), ("second", "b")):
            assert text(answer(client, name, PROMPTS[2])) == expected[adapter][2]


def test_an_adapter_that_is_lost_is_no_longer_served(folder: Path, root: Path, caplog: Any) -> None:
    """As if its folder had gone before the engine was started again."""
    llm = LLM(folder, dtype="float32", max_adapters=2)
    with (
        inside(folder, llm.engine, adapters_dir=root) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        for name in ("a", "b"):
            assert put(client, name, name).status_code == 200
        service = server.running.service
        ready = service.supervisor.ready
        assert ready is not None
        service.note_ready(msgspec.structs.replace(ready, lost={"a": ("what", "why", "fix")}))
        assert models(client) == ["tiny", "b"]
        assert [*service.supervisor._start.adapters] == ["b"]
        assert "the adapter a is gone: what" in caplog.text
