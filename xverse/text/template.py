"""MESSAGES -> IDS BY TEMPLATE. Chats of models whose folder brings a Jinja chat template.

The ids are those of Hugging Face's `apply_chat_template`. Special tokens come from the template
only: before rendering, their names in the messages are replaced by private-use characters, and
afterwards written out as plain text.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial

from tokenizers import AddedToken

from xverse.errors import XverseError
from xverse.text.message import Cut, Encoded, Message, check_messages
from xverse.text.repair import token_text
from xverse.text.sandbox import compile_template, render
from xverse.text.tokenizer import Tokenizer

MAX_TEMPLATE = 128 << 10  # characters; the longest published ones have about 20,000
PRIVATE_USE = range(0xF0000, 0xFFFFE)
SPECIAL_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Borders = tuple[str, str]  # the text before a message, and through its end


class TemplateFormat:
    """The chat format that a Jinja template describes."""

    name = "template"

    def __init__(self, template: str) -> None:
        """Compile the template; XverseError if it is too long or no Jinja."""
        if len(template) > MAX_TEMPLATE:
            raise XverseError(
                "The chat template is too long.",
                f"It has {len(template):,} characters, and {MAX_TEMPLATE:,} are enough for any.",
                "Use the template of the original model.",
            )
        self.template = template
        try:
            compile_template(template)
        except Exception as error:
            raise _refused("The chat template can't be read.", error) from error

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
        """Encode `messages`. The mask is of use for conversations that end with the assistant;
        others are prompts, and theirs is all False. Over the budget, whole old rounds go."""
        page = self._page(messages, tokenizer, tools, now)
        asks = add_generation_prompt
        if asks is None:
            asks = messages[-1]["role"] != "assistant"
        kept = page.fit(asks, max_prompt_tokens)
        ids = page.encode(kept, asks)
        mask = [False] * len(ids)
        if not asks and kept[-1]["role"] == "assistant":
            mask = page.mask(kept, ids)
        dropped = len(messages) - len(kept)
        return Encoded(ids, mask, Cut(dropped, 0, False) if dropped else None)

    def lessons(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        tools: Sequence[Mapping[str, object]] | None = None,
        now: datetime | None = None,
    ) -> list[Encoded]:
        """What is learned from a conversation: see ChatFormat. Templates that write earlier
        messages differently once later ones follow (some leave out what was thought), or whose
        prompt ends in what would be one token with an answer, give one Encoded for each answer."""
        page = self._page(messages, tokenizer, tools, now)
        borders = page.borders(page.messages)
        if None not in borders:
            ids = page.encode(page.messages, asks=False)
            if page.asks_so(ids, borders):
                return [Encoded(ids, page.paint(ids, borders), None)]
        ends = [at for at, one in enumerate(messages, start=1) if one["role"] == "assistant"]
        return [page.lesson(page.messages[:end]) for end in ends]

    def _page(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        tools: Sequence[Mapping[str, object]] | None,
        now: datetime | None,
    ) -> "_Page":
        check_messages(messages)
        if tools and not re.search(r"\btools\b", self.template):
            raise XverseError(
                "This model's chat template has no place for tools.",
                "It never mentions them, so the model would not see them.",
                "Leave the tools out, or use a model made for function calls.",
            )
        return _Page(self.template, tokenizer, [*map(_with_objects, messages)], tools, now)


class _Page:
    """One conversation on its way through the template."""

    def __init__(
        self,
        template: str,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, object]] | None,
        now: datetime | None,
    ) -> None:
        self.template, self.tokenizer = template, tokenizer
        self.messages, self.tools, self.now = messages, tools, now
        added = tokenizer.backend.get_added_tokens_decoder().values()
        specials = sorted((token for token in added if token.special), key=_longest_first)
        self.names = [token.content for token in specials]
        self.find = re.compile("|".join(map(_pattern, specials)) or r"(?!)")
        present = {character for text in _texts([messages, tools]) for character in text}
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in present)
        self.hidden = dict(zip(self.names, free, strict=False))
        first = {name[0] for name in self.names}
        self.wary = not first.isdisjoint(present)
        beginnings = dict(zip(sorted(first.difference(self.names)), free, strict=False))
        self.hidden_strictly = self.hidden | beginnings

    def fit(self, asks: bool, budget: int | None) -> Sequence[Message]:
        """The messages less the oldest rounds that don't fit; the system message always stays."""
        if budget is None or len(self.encode(self.messages, asks)) <= budget:
            return self.messages
        head = 1 if self.messages[0]["role"] == "system" else 0
        roles = [message["role"] for message in self.messages]
        starts = [at for at in range(head + 1, len(roles)) if roles[at] == "user"]
        kept = [[*self.messages[:head], *self.messages[start:]] for start in starts]
        best = bisect_left(kept, True, key=lambda rest: len(self.encode(rest, asks)) <= budget)
        if best == len(kept):
            raise XverseError(
                "The conversation does not fit.",
                f"Even its last round alone has more than {budget} tokens.",
                "Shorten it, or allow a shorter answer.",
            )
        return kept[best]

    def encode(self, messages: Sequence[Message], asks: bool) -> list[int]:
        """Ids of the rendered messages."""
        return self._ids(self.text(messages, asks))

    def text(self, messages: Sequence[Message], asks: bool) -> str:
        """The rendered messages, with stand-ins for special tokens' names that they contain.

        Two messages side by side could spell a special token together. So that is looked for too,
        with stand-ins for the first characters of special tokens, where the template allows it.
        """
        text = self._rendered(messages, asks, self.hidden)
        if not self.wary:
            return text
        try:
            strict = self._rendered(messages, asks, self.hidden_strictly)
        except XverseError:
            return text
        alike = _restore(strict, self.hidden_strictly) == _restore(text, self.hidden)
        return strict if alike and self._count(strict) < self._count(text) else text

    def mask(self, messages: Sequence[Message], ids: list[int]) -> list[bool]:
        """True for the ids of what the assistant says, and for the end after each message."""
        borders = self.borders(messages)
        if None in borders:
            raise _untrainable("it writes earlier messages differently once later ones follow")
        return self.paint(ids, borders)

    def paint(self, ids: list[int], borders: Sequence["Borders | None"]) -> list[bool]:
        """The mask of `ids`: True between each two borders, up to the last special token there."""
        mask = [False] * len(ids)
        for before, after in filter(None, borders):
            start, end = (_common(ids, self._ids(part)) for part in (before, after))
            said = self._said(ids[start:end])
            mask[start : start + said] = [True] * said
        return mask

    def _said(self, ids: list[int]) -> int:
        """How many of an answer's ids the assistant says: up to the last special token, or all."""
        ends = [at for at, id in enumerate(ids, start=1) if id in self.tokenizer.special_ids]
        return ends[-1] if ends else len(ids)

    def asks_so(self, ids: list[int], borders: Sequence["Borders | None"]) -> bool:
        """Whether `ids` have, before each of these messages, the very prompt that asks for it."""
        prompts = [self._ids(before) for before, _ in filter(None, borders)]
        return all(ids[: len(prompt)] == prompt for prompt in prompts)

    def lesson(self, messages: Sequence[Message]) -> Encoded:
        """The last message, an answer, behind the prompt that asks for it, and it alone learned."""
        [border] = self.borders(messages)[-1:]
        if border is None:
            raise _untrainable("what it asks an answer with is not how it writes that answer")
        ids = self.encode(messages, asks=False)
        if self.asks_so(ids, [border]):
            return Encoded(ids, self.paint(ids, [border]), None)
        before, after = border
        asked, said = self._ids(before), self._ids(after.removeprefix(before))
        if self._decoded(asked + said) != self._decoded(self._ids(after)):
            raise _untrainable("an answer encoded behind its prompt is not the text it writes")
        learned = self._said(said)
        mask = [False] * len(asked) + [at < learned for at in range(len(said))]
        return Encoded(asked + said, mask, None)

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special=False)

    def borders(self, messages: Sequence[Message]) -> list["Borders | None"]:
        """Of each of the assistant's messages: the text before it, and that through its end. None
        where `messages` as a whole do not begin so."""
        whole = self.text(messages, asks=False)
        ends = [at for at, one in enumerate(messages, start=1) if one["role"] == "assistant"]
        return [self._border(messages[:end], whole) for end in ends]

    def _border(self, messages: Sequence[Message], whole: str) -> "Borders | None":
        before = self.text(messages[:-1], asks=True)
        after = self.text(messages, asks=False)
        if not whole.startswith(after):  # some templates end each conversation with it
            after = after.removesuffix(self.tokenizer.eos_token or "")
        return (before, after) if whole.startswith(after) and after.startswith(before) else None

    def _rendered(self, messages: Sequence[Message], asks: bool, hidden: Mapping[str, str]) -> str:
        pattern = re.compile("|".join(map(re.escape, hidden)) or r"(?!)")
        hide = partial(pattern.sub, lambda match: hidden[match[0]])
        config, tokenizer = self.tokenizer.config, self.tokenizer
        named = {f"{kind}_token": token_text(config.get(f"{kind}_token")) for kind in SPECIAL_NAMES}
        named |= {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        named |= {"pad_token": tokenizer.pad_token}
        variables: dict[str, object] = {
            "messages": _mapped(list(messages), hide),
            "tools": _mapped(self.tools, hide),
            "documents": None,
            "add_generation_prompt": asks,
            **{name: token for name, token in named.items() if token is not None},
        }
        if self.now is not None:
            variables["strftime_now"] = self.now.strftime
        try:
            return render(self.template, variables)
        except Exception as error:
            raise _refused("The chat template can't write this conversation.", error) from error

    def _ids(self, text: str) -> list[int]:
        """Ids of a rendered text. Where it has stand-ins, it is cut at the special tokens, which
        are the template's own, and the names come back as text between them."""
        if not any(character in text for character in self.hidden_strictly.values()):
            return self.tokenizer.encode(text, add_special=False, parse_special=True)
        ids: list[int] = []
        done = 0
        for match in self.find.finditer(text):
            assert match.lastindex is not None
            special = self.tokenizer.backend.token_to_id(self.names[match.lastindex - 1])
            assert special is not None
            ids += [*self._plain_ids(text[done : match.start()]), special]
            done = match.end()
        return ids + self._plain_ids(text[done:])

    def _plain_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(_restore(text, self.hidden_strictly), add_special=False)

    def _count(self, text: str) -> int:
        return sum(1 for _ in self.find.finditer(text))


def _longest_first(token: AddedToken) -> int:
    return -len(token.content)


def _pattern(token: AddedToken) -> str:
    """Where the backend finds `token`, with the white space that it swallows."""
    before, after = r"\s*" if token.lstrip else "", r"\s*" if token.rstrip else ""
    return f"{before}({re.escape(token.content)}){after}"


def _texts(value: object) -> list[str]:
    """Every text in a JSON-like value."""
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def _mapped(value: object, change: Callable[[str], str]) -> object:
    """A JSON-like value with every text in it changed, keys too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_mapped(key, change): _mapped(part, change) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(part, change) for part in value]
    return value


def _restore(text: str, hidden: Mapping[str, str]) -> str:
    for name, character in hidden.items():
        text = text.replace(character, name)
    return text


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of what two lists of ids begin with in common."""
    shorter = min(len(left), len(right))
    return next((at for at in range(shorter) if left[at] != right[at]), shorter)


def _with_objects(message: Message) -> Message:
    """The message, the arguments of its function calls as objects, which templates expect."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_with_object(call) for call in calls]}


def _with_object(call: object) -> object:
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(arguments, str) or not isinstance(call, Mapping):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": parsed}}


def _refused(what: str, error: Exception) -> XverseError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return XverseError(what, why, "Correct the messages, or use another chat template.")


def _untrainable(why: str) -> XverseError:
    return XverseError(
        "This chat template can't be trained with.",
        f"{why[0].upper()}{why[1:]}.",
        "Train on conversations of one round, or change the template.",
    )
