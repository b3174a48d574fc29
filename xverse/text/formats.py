"""WHAT A FORMAT IS -> IDS. XVERSE's formats of conversations, each a table of prefixes and ends."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile

from xverse.errors import XverseError
from xverse.text.message import Cut, Encoded, Message, check_messages
from xverse.text.tokenizer import Tokenizer
from xverse.text.tools import render_tool_calls, render_tools

TEMPLATE = """\
{% set prefixes = PREFIXES %}
{% set endings = ENDINGS %}
{% if tools %}
{{ raise_exception('This template has no place for tools: put them into the first message.') }}
{% endif %}
{% for message in messages %}
{% set role = 'exec' if message['role'] == 'tool' else message['role'] %}
{% if role not in prefixes %}
{{ raise_exception('This format has no role ' ~ message['role'] ~ '.') }}
{% elif message['tool_calls'] %}
{{ raise_exception('This template has no place for tool calls: write them into the content.') }}
{% elif (role == 'system' and not loop.first) or (role == 'assistant' and loop.first) %}
{{ raise_exception('A message with role ' ~ role ~ ' is out of place.') }}
{% endif %}
{{ prefixes[role] + message['content'] + endings[role] }}\
{% if role == 'assistant' %}{{ eos_token }}PARTING{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ prefixes['assistant'] }}{% endif %}"""


@dataclass(frozen=True)
class Turn:
    """One message as this format has it."""

    role: str
    content: str


@dataclass(frozen=True)
class Span:
    """Some ids, and which of them are trained on."""

    ids: list[int]
    mask: list[bool]

    @classmethod
    def join(cls, spans: Iterable["Span"]) -> "Span":
        """The spans one after another."""
        parts = list(spans)
        return cls(
            [id for part in parts for id in part.ids],
            [learned for part in parts for learned in part.mask],
        )


@dataclass(frozen=True)
class XverseFormat:
    """One of the published formats: what stands before and after the contents of each role."""

    name: str
    prefixes: Mapping[str, str]
    endings: Mapping[str, str]
    joint: frozenset[str]  # roles whose prefix and content are encoded as one text
    between: str = ""  # between the end of an answer and the next message

    @property
    def template(self) -> str:
        """The format as a Jinja chat template (see the module's docstring on ids)."""
        prefixes, endings = (json.dumps(table) for table in (self.prefixes, self.endings))
        filled = TEMPLATE.replace("PREFIXES", prefixes).replace("ENDINGS", endings)
        parting = f"{{% if not loop.last %}}{{{{ {json.dumps(self.between)} }}}}{{% endif %}}"
        return filled.replace("PARTING", parting if self.between else "")

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        max_prompt_tokens: int | None = None,
        tools: Sequence[Mapping[str, object]] | None = None,
        add_generation_prompt: bool | None = None,
        now: datetime | None = None,
    ) -> Encoded:
        """Encode `messages` as the published code does, and say in `cut` what did not fit.

        `tools` go into the first user message. Without a budget nothing is ever cut.
        """
        turns = self._turns(messages, tools, now)
        rounds = _rounds(turns)
        asks = add_generation_prompt
        if asks is None:
            asks = turns[-1].role in {"user", "exec"}
        span, cut_tokens = self._newest(rounds[-1], tokenizer, asks, max_prompt_tokens)
        kept = len(rounds[-1])
        spans = [span]
        room = math.inf if max_prompt_tokens is None else max_prompt_tokens - len(span.ids)
        for older in reversed(rounds[:-1]):
            spans.append(self._encode(older, tokenizer))
            room -= len(spans[-1].ids)
            if room < 0:
                spans.pop()
                break
            kept += len(older)
        span = Span.join(reversed(spans))
        dropped = turns[: len(turns) - kept]
        cut = Cut(len(dropped), cut_tokens, any(turn.role == "system" for turn in dropped))
        return Encoded(span.ids, span.mask, cut if cut != Cut(0, 0, False) else None)

    def lessons(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
    ) -> list[Encoded]:
        """What is learned from a conversation: see ChatFormat."""
        if "assistant" not in self.joint:
            return [self.render(messages, tokenizer, tools=tools, now=now)]
        # In v1's history "Assistant: Hi" ends in "_Hi", but the prompt of that answer in "_".
        found: list[Encoded] = []
        for at, message in enumerate(messages):
            if message["role"] != "assistant" or not at:
                continue
            asked = self.render(
                messages[:at], tokenizer, tools=tools, now=now, add_generation_prompt=True
            )
            turn = self._turn(message, first=False)
            said = [*_plain(tokenizer, turn.content), _end_id(tokenizer)]
            before = found[-1] if found else Encoded([], [], None)
            if asked.ids[: len(before.ids)] == before.ids:
                found[-1:] = []  # its answers and this one are learned in one reading
                seen = before.mask + [False] * (len(asked.ids) - len(before.ids))
            else:
                seen = [False] * len(asked.ids)
            found.append(Encoded(asked.ids + said, seen + [True] * len(said), asked.cut))
        return found

    def _turns(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        now: datetime | None,
    ) -> list[Turn]:
        check_messages(messages)
        turns = [self._turn(message, first=not at) for at, message in enumerate(messages)]
        asked = [at for at, turn in enumerate(turns) if turn.role == "user"]
        if tools and not asked:
            raise XverseError(
                "The tools have no place in this conversation.",
                "They are listed in the first user message, and there is none.",
                "Add a user message.",
            )
        if tools:
            first = asked[0]
            turns[first] = Turn("user", render_tools(tools, turns[first].content, now=now))
        return turns

    def _turn(self, message: Message, *, first: bool) -> Turn:
        role, content = str(message["role"]), str(message.get("content") or "")
        if role == "tool" and "exec" in self.prefixes:
            role = "exec"
        if role not in self.prefixes:
            raise XverseError(
                f"The chat format {self.name} has no role {role!r:.40}.",
                f"The model was trained with these: {', '.join(self.prefixes)}.",
                "Use one of them, or another model.",
            )
        if role == "system" and not first:
            raise XverseError(
                "A system message is not the first message.",
                "The model was trained with the system message in front only.",
                "Move it to the front.",
            )
        if role == "assistant" and message.get("tool_calls"):
            calls = render_tool_calls(message["tool_calls"])
            content = f"{content}\n{calls}" if content else calls
        return Turn(role, content)

    def _encode(self, turns: Sequence[Turn], tokenizer: Tokenizer) -> Span:
        """The ids of a round that is followed by another."""
        spans = [self._encode_turn(turn, tokenizer) for turn in turns]
        if self.between and turns[-1].role == "assistant":
            spans.append(_untrained(_plain(tokenizer, self.between)))
        return Span.join(spans)

    def _encode_turn(self, turn: Turn, tokenizer: Tokenizer) -> Span:
        prefix = _plain(tokenizer, self.prefixes[turn.role])
        content = turn.content + self.endings[turn.role]
        if turn.role in self.joint:
            ids = _plain(tokenizer, self.prefixes[turn.role] + content)
            same = takewhile(lambda pair: pair[0] == pair[1], zip(ids, prefix, strict=False))
            learned = len(ids) - len(list(same))
        else:
            body = _plain(tokenizer, content)
            ids, learned = prefix + body, len(body)
        if turn.role != "assistant":
            return _untrained(ids)
        mask = [False] * (len(ids) - learned) + [True] * (learned + 1)
        return Span([*ids, _end_id(tokenizer)], mask)

    def _newest(
        self, turns: Sequence[Turn], tokenizer: Tokenizer, asks: bool, budget: int | None
    ) -> tuple[Span, int]:
        """The newest round, with the beginning of an answer if it `asks` for one, and how many
        tokens were cut off its message: v1 keeps the prompt's last, v2 and v3 the message's first.
        """
        opening = _untrained(_plain(tokenizer, self.prefixes["assistant"]) if asks else [])
        last = turns[-1]
        if last.role not in {"user", "exec"}:
            span = Span.join([*(self._encode_turn(turn, tokenizer) for turn in turns), opening])
            if budget is not None and len(span.ids) > budget:
                raise _too_long(len(span.ids), budget)
            return span, 0
        if self.joint and asks:
            text = self.prefixes["user"] + last.content + self.endings["user"]
            ids, opening = _plain(tokenizer, text + self.prefixes["assistant"]), Span([], [])
        else:
            ids = self._encode_turn(last, tokenizer).ids
        room = len(ids) if budget is None else budget - len(opening.ids)
        if room < 1:
            raise _too_long(len(ids), budget or 0)
        kept = ids[-room:] if self.joint else ids[:room]
        return Span.join([_untrained(kept), opening]), len(ids) - len(kept)


V1 = XverseFormat(
    name="v1",
    prefixes={"user": "Human: ", "assistant": "Assistant: "},
    endings={"user": "\n\n", "assistant": ""},
    joint=frozenset({"user", "assistant"}),
)
V2 = XverseFormat(
    name="v2",
    prefixes={
        "system": "Human: ",
        "user": "Human: ",
        "exec": "Exec: ",
        "assistant": "Assistant: ",
    },
    endings={"system": "\n", "user": "\n\n", "exec": "\n\n", "assistant": ""},
    joint=frozenset(),
)
V3 = XverseFormat(
    name="v3",
    prefixes={
        "system": "system: ",
        "user": "user: ",
        "exec": "exec: ",
        "assistant": "assistant: ",
    },
    endings={"system": "\n", "user": "\n", "exec": "\n", "assistant": ""},
    joint=frozenset(),
)
# The prompts of the trainer in the published fine-tuning command, as of early 2024: a question and
# the beginning of its answer are one text, answers are encoded alone, and no BOS is added.
DEFAULT = XverseFormat(
    name="default",
    prefixes={"system": "", "user": "Human: ", "assistant": "Assistant: "},
    endings={"system": "\n", "user": "\n", "assistant": ""},
    joint=frozenset({"user"}),
    between="\n",
)
XVERSE = XverseFormat(
    name="xverse",
    prefixes={"user": "Human: ", "assistant": "Assistant: "},
    endings={"user": "\n\n", "assistant": ""},
    joint=frozenset({"user"}),
)
XVERSE_FORMATS = {chat.name: chat for chat in (V1, V2, V3, DEFAULT, XVERSE)}


def _rounds(turns: Sequence[Turn]) -> list[list[Turn]]:
    """Turns by round: a message of the user's side, and the assistant's that follow it. Assistant
    messages before the first are in none: the published code drops them."""
    rounds: list[list[Turn]] = []
    for turn in turns:
        if turn.role != "assistant":
            rounds.append([turn])
        elif rounds:
            rounds[-1].append(turn)
    if not rounds:
        raise XverseError(
            "The conversation has assistant messages only.",
            "Each of them answers a message, and there is none.",
            "Add the user message.",
        )
    return rounds


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a piece of the conversation: no special token is parsed in it, none added to it."""
    return tokenizer.encode(text, add_special=False)


def _untrained(ids: list[int]) -> Span:
    return Span(ids, [False] * len(ids))


def _end_id(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise XverseError(
            "The tokenizer has no end-of-text token.",
            "The chat format puts it after each of the assistant's messages.",
            "Name the eos_token in tokenizer_config.json.",
        )
    return tokenizer.eos_id


def _too_long(length: int, budget: int) -> XverseError:
    return XverseError(
        "The conversation does not fit.",
        f"Its newest round has {length} tokens, and {budget} are allowed.",
        "Shorten it, or allow a shorter answer.",
    )
