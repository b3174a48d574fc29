"""The Modelfile: its Go template, read by an interpreter of its own, writes XVERSE's formats."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.checkpoint.quantized_folders import write_folder
from tests.tiny_model import GENERATION, published_config, random_decoder
from xverse.checkpoint.ollama import go_template, modelfile, modelfile_of
from xverse.text.chat import V1, V2, V3, XverseFormat

Messages = Sequence[Mapping[str, str]]


class Go:
    """As much of Go's text/template as the Modelfile uses: range, if, end, :=, eq, ne, and, not,
    len, slice, strings, fields, and the markers that trim the text around an action."""

    def __init__(self, source: str) -> None:
        pieces = re.split(r"(\{\{-?.*?-?\}\})", source, flags=re.DOTALL)
        for at, piece in enumerate(pieces):
            if at % 2 and piece.startswith("{{- "):
                pieces[at - 1] = pieces[at - 1].rstrip(" \t\r\n")
            if at % 2 and piece.endswith(" -}}"):
                pieces[at + 1] = pieces[at + 1].lstrip(" \t\r\n")
        self.items: Iterator[tuple[bool, str]] = iter(
            [(bool(at % 2), piece.strip("{}-").strip() if at % 2 else piece)
             for at, piece in enumerate(pieces)]
        )  # fmt: skip
        self.tree = self.block()

    def block(self) -> list[tuple[str, object]]:
        nodes: list[tuple[str, object]] = []
        for is_action, text in self.items:
            if not is_action:
                nodes.append(("text", text))
            elif text == "end":
                return nodes
            elif text.startswith(("range ", "if ")):
                word, _, rest = text.partition(" ")
                nodes.append((word, (rest, self.block())))
            else:
                nodes.append(("action", text))
        return nodes

    def run(self, messages: Messages) -> str:
        self.out: list[str] = []
        self.names: dict[str, object] = {"$": {"Messages": messages}}
        self.walk(self.tree, self.names["$"])
        return "".join(self.out)

    def walk(self, nodes: list[tuple[str, object]], dot: object) -> None:
        for kind, what in nodes:
            if kind == "text":
                self.out.append(str(what))
            elif kind == "action":
                self.action(str(what), dot)
            else:
                head, inner = what  # type: ignore[misc]
                self.control(kind, head, inner, dot)

    def action(self, text: str, dot: object) -> None:
        name, assigned, value = text.partition(" := ")
        if assigned:
            self.names[name] = self.value(value, dot)
        else:
            self.out.append(str(self.value(text, dot)))

    def control(self, kind: str, head: str, inner: list[tuple[str, object]], dot: object) -> None:
        if kind == "if":
            if self.value(head, dot):
                self.walk(inner, dot)
            return
        index, item = head.partition(" := ")[0].split(", ")
        for at, one in enumerate(self.value(head.partition(" := ")[2], dot)):  # type: ignore[arg-type, var-annotated]
            self.names[index], self.names[item] = at, one
            self.walk(inner, one)

    def value(self, text: str, dot: object) -> object:
        words = re.findall(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()"]+', text)
        return self.call(words, dot)

    def call(self, words: list[str], dot: object) -> object:
        values: list[object] = []
        function = ""
        while words:
            word = words.pop(0)
            if word == ")":
                break
            if word == "(":
                values.append(self.call(words, dot))
            elif word in ("eq", "ne", "and", "not", "len", "slice"):
                assert not values
                assert not function
                function = word
            else:
                values.append(self.atom(word, dot))
        return self.apply(function, values)

    def atom(self, word: str, dot: object) -> object:
        if word.startswith('"'):
            return json.loads(word)
        if word.isdigit():
            return int(word)
        base, *fields = word.split(".")
        found = self.names[base] if base else dot
        for name in fields:
            found = found[name] if name in found else found[name.lower()]  # type: ignore[index, operator]
        return found

    def apply(self, function: str, values: list[object]) -> object:
        if not function:
            assert len(values) == 1, "Go would take the first for a function"
            return values[0]
        return {
            "eq": lambda: values[0] == values[1],
            "ne": lambda: values[0] != values[1],
            "and": lambda: all(values),
            "not": lambda: not values[0],
            "len": lambda: len(values[0]),  # type: ignore[arg-type]
            "slice": lambda: values[0][values[1] :],  # type: ignore[index, misc]
        }[function]()


def said(*turns: str) -> list[dict[str, str]]:
    return [dict(zip(("role", "content"), turn.split(":", 1), strict=True)) for turn in turns]


CHATS = {
    "one": said("user:Hi"),
    "spaces and lines": said("user:  {{ a }} \n\n b  "),
    "rounds": said("user:你好", "assistant:您好！", "user:再见"),
    "quotes": said('user:say "x" \\n'),
}
WITH_SYSTEM = {
    "system": said("system:Be brief.", "user:Hi"),
    "tools": said("user:weather?", "assistant:calling", "tool:12°", "assistant:cold", "user:ok"),
}


def rendered(chat: XverseFormat, messages: Messages, end: str = "<end>") -> str:
    """The prompt as spec has it: each content between what its role begins and ends with."""
    text = ""
    for message in messages:
        role = {"tool": "exec"}.get(message["role"], message["role"])
        text += chat.prefixes[role] + message["content"] + chat.endings[role]
        text += end if role == "assistant" else ""
    return text + chat.prefixes["assistant"]


@pytest.mark.parametrize("chat", [V1, V2, V3], ids=lambda chat: chat.name)
def test_the_template_writes_the_format(chat: XverseFormat) -> None:
    chats = CHATS if chat is V1 else CHATS | WITH_SYSTEM
    for name, messages in chats.items():
        got = Go(go_template(chat, "<end>")).run(messages)
        assert got == rendered(chat, messages), name


def test_published_prompts_letter_by_letter() -> None:
    messages = said("system:SYS", "user:U1", "assistant:A1", "user:U2")
    assert Go(go_template(V2, "<|endoftext|>")).run(messages) == (
        "Human: SYS\nHuman: U1\n\nAssistant: A1<|endoftext|>Human: U2\n\nAssistant: "
    )
    assert Go(go_template(V3, "<|endoftext|>")).run(messages) == (
        "system: SYS\nuser: U1\nassistant: A1<|endoftext|>user: U2\nassistant: "
    )


def test_a_beginning_of_an_answer_is_continued() -> None:
    messages = said("user:Hi", "assistant:Once upon")
    assert Go(go_template(V2, "<end>")).run(messages) == "Human: Hi\n\nAssistant: Once upon"


def test_the_file_names_model_sampling_and_end() -> None:
    text = modelfile("m.gguf", V2, GENERATION, end="<|endoftext|>", context=4096)
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{- range')
    for line in (
        "PARAMETER num_ctx 4096", "PARAMETER temperature 0.5", "PARAMETER top_k 30",
        "PARAMETER top_p 0.85", "PARAMETER repeat_penalty 1.1", "PARAMETER num_predict 32",
        'PARAMETER stop "<|endoftext|>"',
    ):  # fmt: skip
        assert line in text.splitlines()
    greedy = modelfile(
        "m.gguf", None, {"do_sample": False, "temperature": 0.7}, end=None, context=9
    )
    assert greedy == "FROM ./m.gguf\nPARAMETER num_ctx 9\nPARAMETER temperature 0\n"


def test_a_folder_says_its_own_format(tmp_path: Path) -> None:
    config = published_config() | {"torch_dtype": "float32"}
    write_folder(tmp_path / "m", random_decoder(config), config)
    text = modelfile_of(tmp_path / "m", "model.gguf")
    template = text.split('"""')[1]
    assert Go(template).run(said("user:Hi")) == "Human: Hi\n\nAssistant: "
    assert 'PARAMETER stop "<|endoftext|>"' in text
