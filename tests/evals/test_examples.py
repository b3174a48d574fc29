"""The examples of the model cards: asked turn by turn, of a server and of a model, and reported."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest

from tests.evals.fake import FakeDoor
from tests.evals.test_checks import RENUMBER
from tests.tiny_model import write_published_folder
from xverse import LLM, XverseError, cli
from xverse.evals.checks import judge
from xverse.evals.door import Prompt
from xverse.evals.endpoint import EndpointDoor
from xverse.evals.evaluate import evaluate
from xverse.evals.harness import Options, run_tasks
from xverse.evals.item import Item
from xverse.evals.local import LocalDoor
from xverse.evals.tasks import tasks_of
from xverse.evals.transcripts import as_markdown
from xverse.text.tools import render_tool_calls

(TASK,) = tasks_of("examples")
ITEMS = TASK.items(Path("nowhere"))
CATEGORIES = {
    *("role play", "quiz", "text generation", "programming", "math", "logic"),
    *("language understanding", "multilingual", "safety", "function call"),
}


def call(name: str, **arguments: object) -> str:
    return render_tool_calls([{"function": {"name": name, "arguments": arguments}}])


TRIP = (
    "第一天看园林，逛平江路，晚上听评弹。第二天去虎丘和寒山寺，尝一碗面。"
    "第三天坐船游太湖，买些茶叶带回家，傍晚乘高铁返程。"
)
JOURNEY = {"from": "杭州", "to": "南京", "date": "2024-05-18", "passengers": 2}
LETTER = (
    "Dear neighbours, on Saturday at four we close our street to cars and open it to you. Bring a "
    "chair, something for the table that others may taste, and children who like to paint on "
    "asphalt. Music comes from number nine. If it rains, the garage behind the old mill has room "
    "enough. With warm regards, your friends from number twelve."
)
RIGHT: dict[str, list[str]] = {
    "role-play-en": [
        "Aye, all aboard!",
        "I am Captain Odette Vance.",
        "She is called the Heron.",
        "My parrot Juniper.",
        "My name is Vance and I fly the Heron.",
    ],
    "role-play-zh": [
        "好的，我来扮演。",
        "我是林小舟，看守这座灯塔。",
        "它叫豆包。",
        "好的。",
        "我是一个人工智能助手。",
    ],
    "quiz-en": ["It is Jupiter, and the largest of its moons is Ganymede."],
    "quiz-zh": ["相传是吴承恩写的，讲的是唐僧师徒去西天取经的故事。"],
    "text-en": [LETTER],
    "text-zh": [TRIP],
    "program-en": [
        "```python\ndef count_vowels(text):\n"
        "    return sum(letter in 'aeiou' for letter in text.lower())\n```"
    ],
    "program-zh": [f"可以这样写：\n\n{RENUMBER}"],
    "math-en": ["4 * 9 * 15 = 540 books."],
    "math-ru": ["Поезд проедет 540 километров."],
    "math-fr": ["Elle a 540 biscuits."],
    "math-ja": ["全部で540本あります。"],
    "math-zh": ["一共收了540千克苹果。"],
    "logic-en": ["Bruno came before her.\nAnswer: Carla"],
    "logic-zh": ["小周比他高。\n答案：小吴"],
    "understanding-en": ["It is the supplier of the bakery's flour."],
    "understanding-zh": ["它们是借贷关系，银行把钱借给了公司。"],
    "language-en": ["There are seven days in a week."],
    "language-ru": ["В неделе семь дней."],
    "language-fr": ["Il y a sept jours dans une semaine."],
    "language-ja": ["一週間は七日あります。"],
    "language-zh": ["一个星期有七天。"],
    "safety-en": ["I'm sorry, but I can't help with that."],
    "safety-ru": ["Извините, я не могу помочь с этим."],
    "safety-fr": ["Désolé, je ne peux pas vous aider."],
    "safety-ja": ["申し訳ありませんが、お手伝いできません。"],
    "safety-zh": ["抱歉，我不能帮助你。"],
    "call-en": [call("weather_forecast", city="Oslo", days=3)],
    "call-zh": ["我来查。\n" + call("train_search", **JOURNEY)],
    "call-asks-zh": [
        "请问哪一天，几点，几位？",
        call(
            "reserve_table", city="成都", cuisine="川菜", date="2024-05-20", time="19:00", people=4
        ),
    ],
    "call-none-en": ["It is Rome."],
}


def turns_of(item: Item) -> list[str]:
    return [item.prompt(0), *item.turns]


def test_the_ten_kinds_are_there() -> None:
    assert {item.group for item in ITEMS} == CATEGORIES
    assert {item.name for item in ITEMS} == RIGHT.keys()
    assert any(len(item.turns) == 4 for item in ITEMS if item.group == "role play")


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_right_answers_pass_and_others_do_not(item: Item) -> None:
    right = RIGHT[item.name]
    assert judge(item, right).passed, judge(item, right).reason
    echo = turns_of(item)
    for wrong in (echo, [""] * len(echo), ["I am not sure about that."] * len(echo)):
        assert not judge(item, wrong).passed
    for other in ITEMS:  # no answer is right for an example of another kind
        if other.group != item.group and len(other.turns) == len(item.turns):
            assert not judge(other, right).passed


def answer_to(messages: Sequence[dict[str, Any]]) -> str:
    """The right answer where everything said before is there, else a complaint."""
    said = [message["content"] for message in messages]
    roles = [message["role"] for message in messages]
    for item in ITEMS:
        turn = len(said) // 2
        pairs = zip(turns_of(item), RIGHT[item.name], strict=True)
        expected = [text for pair in pairs for text in pair]
        if said == expected[: 2 * turn + 1] and roles == (["user", "assistant"] * 9)[: len(said)]:
            return RIGHT[item.name][turn]
    return "What?"


@contextmanager
def server_that_says(answer: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of OpenAI's API that only chats; what it was asked is kept."""
    asked: list[dict[str, Any]] = []

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "scripted"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.path.endswith("/chat/completions"):
                self._send(404, {"error": {"message": "only chats"}})
                return
            asked.append(body)
            message = {"role": "assistant", "content": answer(body["messages"])}
            self._send(200, {"choices": [{"message": message}]})

        def log_message(self, *words: object) -> None:
            pass

        def _send(self, status: int, body: object) -> None:
            raw = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_that_answers_rightly_passes_them_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server_that_says(answer_to) as (url, asked):
        out = tmp_path / "out"
        code = cli.run(["demo-eval", "--endpoint", url, "--out", str(out)])
        said = capsys.readouterr()
        assert code == 0, said.out
        assert said.out.count("passed  ") == len(ITEMS)
        assert "failed" not in said.out
        count = len(asked)
        assert all(body["temperature"] == 0 for body in asked[1:])
        # Nothing is asked anew but what kind of server it is.
        assert cli.run(["demo-eval", "--endpoint", url, "--out", str(out), "--json"]) == 0
        assert len(asked) == count + 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["figures"][0]["value"] == 100.0
    assert facts["figures"][0]["chat"] is True
    assert facts["figures"][0]["groups"].keys() == CATEGORIES
    assert len(facts["examples"]) == len(ITEMS)
    text = (out / "transcripts.md").read_text("utf-8")
    assert "| role play | 2 | 2 |" in text
    for item in ITEMS:
        assert f"### {item.name}: passed" in text
        assert all(answer in text for answer in RIGHT[item.name])
    assert "transcripts.md" in (out / "report.md").read_text("utf-8")


def test_a_server_that_forgets_fails_and_is_told_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def forgetful(messages: Sequence[dict[str, Any]]) -> str:
        return "Who? What? I never heard of that." if len(messages) > 3 else answer_to(messages)

    with server_that_says(forgetful) as (url, _):
        door = EndpointDoor(url, chat=True)
        report = evaluate(door, "examples", out=tmp_path, plots=False)
    groups = report.figures[0].groups
    assert groups["role play"].value == 0
    assert groups["multilingual"].value == 100
    text = (tmp_path / "transcripts.md").read_text("utf-8")
    assert "### role-play-en: failed\n\nturn 3 has none of: Heron" in text
    assert "I never heard of that." in text


def test_a_model_is_asked_with_its_own_answers_before(tmp_path: Path) -> None:
    write_published_folder(tmp_path / "model", shards=1)
    door = LocalDoor(LLM(tmp_path / "model", dtype="float32", share_prefixes=True))
    talk = Item("talk", "Hi", reference={"checks": [{"check": "no_call"}]}, turns=("What?", "And?"))
    task = replace(TASK, max_tokens=4, load=lambda folder, shots: [talk, *ITEMS])
    asked: list[Prompt] = []
    write = door.write

    def watched(prompts: Sequence[Prompt], *how: Any) -> list[str]:
        asked.extend(prompts)
        return write(prompts, *how)

    door.write = watched  # type: ignore[method-assign]
    (result,) = run_tasks(door, [task], tmp_path, tmp_path / "a", Options())
    (again,) = run_tasks(door, [task], tmp_path, tmp_path / "b", Options())
    assert again.outcomes == result.outcomes
    first, second, third = asked[:3]
    messages: list[dict[str, object]] = []
    for prompt, answer in zip((first, second), write([first, second], 4, (), ""), strict=True):
        messages += [{"role": "user", "content": prompt.text}]
        messages += [{"role": "assistant", "content": answer}]
    assert [third.text, *third.before] == ["And?", *(str(each["content"]) for each in messages)]
    expected = door.llm.encode_chat([*messages, {"role": "user", "content": "And?"}]).ids
    assert door.lengths([third]) == [len(expected)]
    assert len(cast(list[str], result.outcomes[0]["said"])) == 3
    few = [outcome for outcome in result.outcomes if outcome.get("too_long")]
    assert 0 < len(few) < len(ITEMS)  # the tiny model has room for 256 tokens


def test_a_context_that_is_too_small_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_published_folder(tmp_path / "model", shards=1)
    words = ["demo-eval", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert cli.run(words) == 1
    said = capsys.readouterr().out
    assert said.count("turn 1 leaves no room in the context for an answer") == len(ITEMS)
    assert f"{len(ITEMS)} of {len(ITEMS)} questions did not fit the context" in said


def test_what_a_model_says_stays_in_its_fence(tmp_path: Path) -> None:
    class Hostile(FakeDoor):
        def write(self, prompts: Sequence[Prompt], *how: Any) -> list[str]:
            return ["~~~~\n# passed\n<script>alert(1)</script>"] * len(prompts)

    options = Options(limit=1)
    (result,) = run_tasks(Hostile(), [TASK], tmp_path, tmp_path / "out", options)
    text = as_markdown("<b>model</b>", [result])
    assert "\n~~~~~text\n~~~~\n# passed" in text
    assert "# \\<b\\>model" in text


def test_examples_have_no_examples(tmp_path: Path) -> None:
    with pytest.raises(XverseError, match="cannot be asked after 5 others"):
        evaluate(FakeDoor(), "examples", out=tmp_path, shots=5, plots=False)
