"""The Modelfile: its Go template, read by an interpreter of our own, writes XVERSE's formats."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.checkpoint.quantized_folders import write_folder
from tests.tiny_model import GENERATION, published_config, random_decoder
from xverse.checkpoint.go_template import render_go
from xverse.checkpoint.ollama import go_template, modelfile, modelfile_of
from xverse.text.chat import DEFAULT, V1, V2, V3, XVERSE, XverseFormat

Messages = Sequence[Mapping[str, str]]


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
        text += end + chat.between if role == "assistant" else ""
    return text + chat.prefixes["assistant"]


@pytest.mark.parametrize("chat", [V1, V2, V3, DEFAULT, XVERSE], ids=lambda chat: chat.name)
def test_the_template_writes_the_format(chat: XverseFormat) -> None:
    chats = CHATS | WITH_SYSTEM if "exec" in chat.prefixes else CHATS
    for name, messages in chats.items():
        got = render_go(go_template(chat, "<end>"), messages)
        assert got == rendered(chat, messages), name


def test_published_prompts_letter_by_letter() -> None:
    messages = said("system:SYS", "user:U1", "assistant:A1", "user:U2")
    assert render_go(go_template(V2, "<|endoftext|>"), messages) == (
        "Human: SYS\nHuman: U1\n\nAssistant: A1<|endoftext|>Human: U2\n\nAssistant: "
    )
    assert render_go(go_template(V3, "<|endoftext|>"), messages) == (
        "system: SYS\nuser: U1\nassistant: A1<|endoftext|>user: U2\nassistant: "
    )


def test_a_beginning_of_an_answer_is_continued() -> None:
    messages = said("user:Hi", "assistant:Once upon")
    assert render_go(go_template(V2, "<end>"), messages) == "Human: Hi\n\nAssistant: Once upon"


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
    assert render_go(template, said("user:Hi")) == "Human: Hi\n\nAssistant: "
    assert 'PARAMETER stop "<|endoftext|>"' in text
