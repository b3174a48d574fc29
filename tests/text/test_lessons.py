"""What is learned: golden ids and masks, and each answer behind what it is asked with."""

from datetime import datetime

import pytest

from tests.text.test_chat import ASSISTANT, END, HELLO, HI, HUMAN, NIHAO, NL, SYSTEM, THREE
from tests.text.test_template import CHATML, gpt
from xverse.errors import XverseError
from xverse.text.chat import DEFAULT, V1, V2, V3, XVERSE, Encoded, TemplateFormat, XverseFormat
from xverse.text.formats import XVERSE_FORMATS
from xverse.text.message import ChatFormat, Message
from xverse.text.tokenizer import Tokenizer

TALK: list[Message] = [*THREE, {"role": "assistant", "content": "你好"}]
KIND = [99451, 96720, 98916, 49]  # You _are _kind .
HUMAN_HELLO = [75, 96666, 96582, 61, 96702, 96760, 114]  # H um an : _H ell o
HUMAN_NIHAO = [*HUMAN, *NIHAO]
FORGETFUL = """\
{% for message in messages %}
{% set said = message['content'] if loop.last else message['content'].split('</think>')[-1] %}
{{ '<|im_start|>' + message['role'] + '\\n' + said + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def taught(chat: ChatFormat, messages: list[Message], tokenizer: Tokenizer) -> list[Encoded]:
    return chat.lessons(messages, tokenizer)


def learned(lesson: Encoded) -> list[int]:
    return [id for id, mask in zip(lesson.ids, lesson.mask, strict=True) if mask]


def asked(lessons: list[Encoded]) -> list[list[int]]:
    """The ids before each answer."""
    return [
        lesson.ids[:at]
        for lesson in lessons
        for at, mask in enumerate(lesson.mask)
        if mask and not lesson.mask[at - 1]
    ]


GOLDEN = {
    # The published trainer's: "\n" and not "\n\n" before "Assistant: ", and "\n" between rounds.
    "default": [
        *HUMAN_NIHAO, NL, *ASSISTANT, *HI, END, NL, *HUMAN_HELLO, NL, *ASSISTANT, *NIHAO, END,
    ],
    "xverse": [
        *HUMAN_NIHAO, NL, NL, *ASSISTANT, *HI, END, *HUMAN_HELLO, NL, NL, *ASSISTANT, *NIHAO, END,
    ],
    "v2": [
        *HUMAN_NIHAO, NL, NL, *ASSISTANT, *HI, END, *HUMAN, *HELLO, NL, NL, *ASSISTANT, *NIHAO, END,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_lessons(name: str, real: Tokenizer) -> None:
    (lesson,) = taught(XVERSE_FORMATS[name], TALK, real)
    assert lesson.ids == GOLDEN[name]
    assert learned(lesson) == [*HI, END, *NIHAO, END]
    assert real.bos_id not in lesson.ids
    assert lesson.ids.count(END) == 2


def test_the_system_message_of_the_published_recipe(real: Tokenizer) -> None:
    (lesson,) = taught(DEFAULT, [*SYSTEM, *TALK[:2]], real)
    assert lesson.ids == [*KIND, NL, *HUMAN_NIHAO, NL, *ASSISTANT, *HI, END]
    assert learned(lesson) == [*HI, END]
    with pytest.raises(XverseError, match="xverse has no role 'system'"):
        taught(XVERSE, [*SYSTEM, *TALK], real)


def test_v1_learns_each_answer_behind_its_own_prompt(real: Tokenizer) -> None:
    """In v1's history "Assistant: Hi" has "_Hi" and the prompt of that answer "_"."""
    first, second = taught(V1, TALK, real)
    assert first.ids == [*HUMAN_NIHAO, NL, NL, *ASSISTANT, *HI, END]
    assert learned(first) == [*HI, END]
    history = [*HUMAN_NIHAO, NL, NL, 68, 97045, 96686, 96714, 61, 96702, 108, END]
    assert second.ids == [*history, *HUMAN_HELLO, NL, NL, *ASSISTANT, *NIHAO, END]
    assert learned(second) == [*NIHAO, END]


def test_v1_is_one_reading_where_nothing_merges(real: Tokenizer) -> None:
    said = [(r, "你好") for _ in range(3) for r in ("user", "assistant")]
    talk: list[Message] = [{"role": role, "content": content} for role, content in said]
    (lesson,) = taught(V1, talk, real)
    assert lesson.ids == V1.render(talk, real).ids == V2.render(talk, real).ids
    assert learned(lesson) == [*NIHAO, END] * 3


@pytest.mark.parametrize("chat", [V1, V2, V3, DEFAULT, XVERSE], ids=lambda chat: chat.name)
@pytest.mark.parametrize("words", ["Hello", "你好", "\n\nx", " y", "<|endoftext|>", "1"])
def test_every_answer_stands_behind_what_it_is_asked_with(
    chat: XverseFormat, words: str, real: Tokenizer
) -> None:
    talk: list[Message] = [
        {"role": role, "content": f"{words}{at}"}
        for at in range(3)
        for role in ("user", "assistant")
    ]
    prompts = asked(taught(chat, talk, real))
    assert len(prompts) == 3
    for at, prompt in enumerate(prompts):
        messages = talk[: 2 * at + 1]
        assert prompt == chat.render(messages, real, add_generation_prompt=True).ids


def test_traps_of_the_ports(real: Tokenizer) -> None:
    """What ports got wrong: one text where v2 has two, no blank line, a BOS, a lost space."""
    (lesson,) = taught(V2, TALK, real)
    whole = "Human: 你好\n\nAssistant: Hi<|endoftext|>Human: Hello\n\nAssistant: 你好<|endoftext|>"
    assert real.decode(lesson.ids, skip_special=False) == whole
    assert lesson.ids != real.encode(whole, add_special=False, parse_special=True)
    (recipe,) = taught(DEFAULT, TALK, real)
    assert "\n\nAssistant" not in real.decode(recipe.ids)
    for one in (lesson, recipe):
        assert one.ids[0] == HUMAN[0]
        ends = [at for at, id in enumerate(one.ids) if id == END]
        assert all(one.mask[at] for at in ends)
        assert one.ids[-1] == END


def test_a_template_that_forgets_gives_a_lesson_for_each_answer() -> None:
    tokenizer, chat = gpt(), TemplateFormat(FORGETFUL)
    talk: list[Message] = [
        {"role": role, "content": f"{words}{at}"}
        for at in range(2)
        for role, words in (("user", "q"), ("assistant", "hm</think>a"))
    ]
    first, second = taught(chat, talk, tokenizer)
    assert tokenizer.decode(learned(first), skip_special=False) == "hm</think>a0<|im_end|>"
    assert tokenizer.decode(learned(second), skip_special=False) == "hm</think>a1<|im_end|>"
    assert "hm" not in tokenizer.decode(second.ids[: len(second.ids) - 15])
    for lesson, messages in ((first, talk[:1]), (second, talk[:3])):
        prompt = chat.render(messages, tokenizer).ids
        assert lesson.ids[: len(prompt)] == prompt
    kept = TemplateFormat(CHATML).lessons(talk, tokenizer)
    assert len(kept) == 1
    assert tokenizer.decode(learned(kept[0])) == "hm</think>a0hm</think>a1"


def test_the_time_that_tools_tell_can_be_fixed(real: Tokenizer) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    now = datetime(2020, 2, 3, 4, 5, 6)
    (lesson,) = V2.lessons(TALK, real, tools=tools, now=now)
    assert "当前时间：2020-02-03 04:05:06" in real.decode(lesson.ids)
    clock = TemplateFormat("{{ strftime_now('%Y') }}{{ messages[-1]['content'] }}{{ eos_token }}")
    ids = clock.render(TALK, real, now=now, add_generation_prompt=True).ids
    assert real.decode(ids).startswith("2020")


def test_a_template_whose_prompt_ends_within_a_token_has_each_answer_behind_its_prompt(
    tiny: Tokenizer,
) -> None:
    """V2's text by a template, encoded jointly: "Assistant: Hi" has "_Hi", and the prompt "_"."""
    chat = TemplateFormat(V2.template)
    said: list[Message] = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
    lessons = chat.lessons(said, tiny)
    prompts = [chat.render(said[:end], tiny, add_generation_prompt=True).ids for end in (1, 3)]
    assert asked(lessons) == prompts
    texts = [tiny.decode(learned(lesson), skip_special=False) for lesson in lessons]
    assert [text.removesuffix(tiny.eos_token or "") for text in texts] == ["Hello!", "2"]
    joint = chat.render(said[:2], tiny, add_generation_prompt=False).ids
    assert joint[: len(prompts[0])] != prompts[0]
