"""FOLDER -> PROOF. Whether training, serving and other programs read a conversation as equal ids.

What a model is asked with when it is trained is the measure of all others: the ids before each
answer. Routes that go through a template give one joint text to their tokenizer, so that they can
have the same text and yet other ids (see xverse.text.chat); that is told apart from another text.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_tokenizer import tokenizer_of
from xverse.checkpoint.gguf_vocab import vocabulary_of
from xverse.checkpoint.gguf_write import write_gguf
from xverse.checkpoint.go_template import render_go
from xverse.checkpoint.load import open_checkpoint, open_tokenizer
from xverse.checkpoint.ollama import go_template
from xverse.errors import XverseError
from xverse.text.chat import XverseFormat, chat_format
from xverse.text.message import ChatFormat, Message
from xverse.text.template import TemplateFormat
from xverse.text.tokenizer import Tokenizer

Verdict = Literal["equal", "same text", "differs", "refuses", "not checked"]
Ask = Callable[[Sequence[Message], Sequence[Any] | None], list[int]]

TRAINING = "training"  # the route of what training itself can't read: nothing is compared then
NOW = datetime(2024, 1, 1, 12)  # prompts with tools tell the time
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
UNCHECKED = (
    "llama.cpp's and Ollama's own code is not run: the GGUF file's template and vocabulary, and "
    "the Modelfile's template, are read by interpreters of ours."
)


@dataclass(frozen=True)
class Finding:
    """How one route reads one conversation, next to how training reads it."""

    conversation: str
    route: str
    verdict: Verdict
    detail: str = ""
    position: int | None = None
    """The first token that differs, from 0."""
    trained: tuple[int, ...] = ()
    found: tuple[int, ...] = ()
    """The ids from there on, a few of them."""


@dataclass(frozen=True)
class Proof:
    """All findings about a folder."""

    folder: str
    chat_format: str
    findings: tuple[Finding, ...]

    def holds(self, *, strict: bool) -> bool:
        """Whether no route reads another text; if `strict`, no other ids either."""
        bad = {"differs", "same text"} if strict else {"differs"}
        return not bad.intersection(finding.verdict for finding in self.findings)

    def facts(self) -> dict[str, object]:
        """The same as JSON values."""
        return {**asdict(self), "unchecked": UNCHECKED}


def conversations(tokenizer: Tokenizer) -> dict[str, list[Message]]:
    """What is tried, each with an answer at its end that is asked for."""
    end = tokenizer.eos_token or "<|endoftext|>"
    return {
        "one round": _said("user:Hello, who are you?", "assistant:I am a model."),
        "three rounds": _said(
            "user:Hi", "assistant:Hello!", "user:1 + 1?", "assistant:2", "user:OK", "assistant:Bye"
        ),
        "system": _said("system:Be brief.", "user:Hi", "assistant:Hello"),
        "empty system": _said("system:", "user:Hi", "assistant:Hello"),
        "Chinese": _said("user:你好，你是谁？", "assistant:模型。", "user:谢谢", "assistant:好"),
        "lines and spaces": _said("user:  a\n\n b \n", "assistant:\n\nx", "user: y", "assistant:z"),
        "special tokens": _said(f"user:a{end}b", f"assistant:c{end}", "user:d", "assistant:e"),
        "function call": [
            *_said("user:Weather in Paris?"),
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            *_said("tool:12 degrees", "assistant:It is cold."),
        ],
        "tools": _said("user:Weather in Paris?", "assistant:I look it up."),
    }


def _said(*turns: str) -> list[Message]:
    return [dict(zip(("role", "content"), turn.split(":", 1), strict=True)) for turn in turns]


def compare(model: Path) -> Proof:
    """How the routes read every conversation; of `model`, a folder or GGUF file, no weights are
    read. XverseError where it has no chat format."""
    checkpoint, tokenizer = open_checkpoint(model), open_tokenizer(model)
    chat = chat_format(checkpoint.config, tokenizer)
    findings: list[Finding] = []
    with TemporaryDirectory() as aside:
        folder = Path(aside) / "model"
        tokenizer.save(folder, chat_template=chat.template, chat_format=chat.name)
        routes: dict[str, Ask | str] = {
            "server": _server(chat, tokenizer),
            "transformers with xverse": _transformers(folder, ours=True),
            "transformers alone": _transformers(folder, ours=False),
            "GGUF": _gguf(
                Path(aside) / "model.gguf",
                vocabulary_of(tokenizer, checkpoint.shape.vocab_size, checkpoint.end_ids),
                chat,
            ),
            "Ollama": _ollama(tokenizer, chat),
        }
        for name, messages in conversations(tokenizer).items():
            tools = [TOOL] if name == "tools" else None
            findings += _findings(name, messages, tools, routes, tokenizer, chat)
    return Proof(str(model), chat.name, tuple(findings))


def _findings(
    name: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    routes: Mapping[str, Ask | str],
    tokenizer: Tokenizer,
    chat: ChatFormat,
) -> Iterator[Finding]:
    try:
        prompts = trained_prompts(messages, tools, tokenizer, chat)
    except XverseError as error:
        yield Finding(name, TRAINING, "refuses", error.what)
        return
    ends = [at for at, one in enumerate(messages) if one["role"] == "assistant"]
    if len(prompts) != len(ends):
        detail = f"{len(prompts)} of {len(ends)} answers are told apart"
        yield Finding(name, TRAINING, "differs", detail)
        return
    for route, ask in routes.items():
        if isinstance(ask, str):
            yield Finding(name, route, "not checked", ask)
        elif tools and route not in ("server", "GGUF"):
            yield Finding(name, route, "not checked", "it tells the time of the clock")
        else:
            found = (
                _compared(name, route, ask, messages[:end], tools, prompt, tokenizer)
                for end, prompt in zip(ends, prompts, strict=True)
            )
            yield _worst(list(found))


def trained_prompts(
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    tokenizer: Tokenizer,
    chat: ChatFormat,
) -> list[list[int]]:
    """Of every answer, the ids that training has before it."""
    prompts = []
    for lesson in chat.lessons(messages, tokenizer, tools=tools, now=NOW):
        starts = [
            at
            for at, learned in enumerate(lesson.mask)
            if learned and not (at and lesson.mask[at - 1])
        ]
        prompts += [lesson.ids[:start] for start in starts]
    return prompts


def _compared(
    name: str,
    route: str,
    ask: Ask,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    trained: Sequence[int],
    tokenizer: Tokenizer,
) -> Finding:
    try:
        found = ask(messages, tools)
    except Exception as error:  # whatever another library raises for what it cannot say
        why = error.what if isinstance(error, XverseError) else str(error).split("\n")[0]
        return Finding(name, route, "refuses", why[:120])
    if found == trained:
        return Finding(name, route, "equal")
    shorter = min(len(found), len(trained))
    at = next((i for i in range(shorter) if found[i] != trained[i]), shorter)
    texts = [tokenizer.decode(ids, skip_special=False) for ids in (trained, found)]
    around = [tokenizer.decode(ids[max(0, at - 3) : at + 3], skip_special=False)
              for ids in (trained, found)]  # fmt: skip
    return Finding(
        name,
        route,
        "same text" if texts[0] == texts[1] else "differs",
        f"trained {around[0]!r}, here {around[1]!r}",
        at,
        tuple(trained[at : at + 5]),
        tuple(found[at : at + 5]),
    )


def _worst(findings: Sequence[Finding]) -> Finding:
    """One finding for all answers of a conversation."""
    order: tuple[Verdict, ...] = ("differs", "same text", "refuses", "not checked", "equal")
    return min(findings, key=lambda finding: order.index(finding.verdict))


def _server(chat: ChatFormat, tokenizer: Tokenizer) -> Ask | str:
    """What /render does."""
    try:
        from xverse.server.service import prompt_of
    except ImportError as error:
        return f"{error.name} is not installed"
    return lambda messages, tools: prompt_of(chat, tokenizer, messages, tools, NOW)


def _transformers(folder: Path, *, ours: bool) -> Ask | str:
    """apply_chat_template of the exported folder; with our class, or as it is without it."""
    try:
        from transformers import PreTrainedTokenizerFast

        from xverse.interop.transformers.tokenizer import XverseTokenizerFast
    except (ImportError, XverseError) as error:
        return f"transformers 5 is not there: {error}".split("\n")[0]
    kind: Any = XverseTokenizerFast if ours else PreTrainedTokenizerFast
    loaded = kind.from_pretrained(folder)

    def ask(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        ids: list[int] = loaded.apply_chat_template(
            list(messages), tools=tools, add_generation_prompt=True, return_dict=False
        )
        return list(ids)

    return ask


def _gguf(file: Path, vocabulary: Mapping[str, object], chat: ChatFormat) -> Ask | str:
    """The template and the vocabulary of a GGUF file, which is written without its weights."""
    metadata = {"general.architecture": "llama", "tokenizer.chat_template": chat.template}
    try:
        write_gguf(file, {**metadata, **vocabulary}, [])
        tokenizer = tokenizer_of(GgufFile.open(file))
    except XverseError as error:
        return error.what
    assert tokenizer.chat_template is not None
    template = TemplateFormat(tokenizer.chat_template)

    def ask(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        return template.render(
            messages, tokenizer, tools=tools, add_generation_prompt=True, now=NOW
        ).ids

    return ask


def _ollama(tokenizer: Tokenizer, chat: ChatFormat) -> Ask | str:
    """The Modelfile's template, whose text Ollama tokenizes with its special tokens."""
    if not isinstance(chat, XverseFormat):
        return "the Modelfile has no template: Ollama takes one of its own"
    template = go_template(chat, tokenizer.eos_token or "")

    def ask(messages: Sequence[Message], tools: Sequence[Any] | None) -> list[int]:
        for message in messages:
            if message["role"] == "system" and "system" not in chat.prefixes:
                raise ValueError("the format has no role system")
            if message.get("tool_calls"):
                raise ValueError("the template has no place for tool calls")
        text = render_go(template, messages)
        return tokenizer.encode(text, add_special=False, parse_special=True)

    return ask
