"""COLUMNS -> LAYOUT. How the rows of a data set say what was said: told, or seen in a row."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from xverse.errors import XverseError

Kind = Literal["alpaca", "sharegpt", "messages", "text"]

# Column of a layout -> its name in the data, where nothing else is told. Those of alpaca's prompt,
# query and response have further names that public data sets use.
COLUMNS: dict[Kind, dict[str, str]] = {
    "alpaca": {
        "prompt": "instruction",
        "query": "input",
        "response": "output",
        "history": "history",
        "system": "system",
        "tools": "tools",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "sharegpt": {
        "messages": "conversations",
        "system": "system",
        "tools": "tools",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "messages": {
        "messages": "messages",
        "prompt": "prompt",
        "system": "system",
        "tools": "tools",
        "chosen": "chosen",
        "rejected": "rejected",
    },
    "text": {"text": "text"},
}
OTHER_NAMES = {
    "prompt": ("prompt", "question", "query"),
    "query": ("context",),
    "response": ("response", "completion", "answer"),
}
# Who speaks -> the name of that in ShareGPT's `from`; others that are met are in OTHER_ROLES.
TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}
OTHER_ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "bot": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "exec": "tool",
    "function": "tool",
    "observation": "tool",
    "function_call": "call",
}
# Columns of what is no text; a row that has something there cannot be learned from as text alone.
MEDIA = ("images", "videos", "audios", "image", "video", "audio")


@dataclass(frozen=True)
class Layout:
    """The kind of a data set, whether its rows are pairs, and what its columns and roles are
    called."""

    kind: Kind
    ranking: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    """Names of the keys of a message and of the roles, as TAGS; empty where those of OpenAI and
    ShareGPT are to be seen by themselves."""

    def get(self, row: Mapping[str, Any], column: str) -> Any:
        """What `row` has there; None where it has nothing, or a text of blanks."""
        value = row.get(self.columns.get(column, ""))
        return None if isinstance(value, str) and not value.strip() else value

    def role(self, name: str) -> str | None:
        """user, assistant, tool, call or system; None for any other name."""
        for tag, role in ROLES.items():
            if tag in self.tags and self.tags[tag] == name:
                return role
        return OTHER_ROLES.get(name)

    def __str__(self) -> str:
        named = ", ".join(self.columns.values())
        return f"{self.kind}{' pairs' if self.ranking else ''} (columns {named})"


def layout_seen(row: Mapping[str, Any], where: str) -> Layout:
    """The layout of a data set whose first row is `row`; XverseError where it is none we know."""
    if isinstance(row.get("label"), bool) or "kto_tag" in row:
        raise XverseError(
            f"{where} holds answers that are marked as good or bad.",
            "Learning from such marks (KTO) is not there, and bad answers would be learned.",
            "Make pairs of them (chosen, rejected), or keep the good ones in another column.",
        )
    ranking = "chosen" in row and "rejected" in row
    if isinstance(row.get("conversations"), list | str):
        return layout_of("sharegpt", ranking)
    if isinstance(row.get("messages"), list | str) or (ranking and _holds_messages(row["chosen"])):
        return layout_of("messages", ranking)
    columns = COLUMNS["alpaca"] | {
        column: next((n for n in (COLUMNS["alpaca"][column], *names) if n in row), names[0])
        for column, names in OTHER_NAMES.items()
    }
    answered = ranking or columns["response"] in row
    if columns["prompt"] in row and answered:
        ranking = ranking or isinstance(row.get(columns["response"]), list)
        return Layout("alpaca", ranking, _used(columns, ranking))
    if isinstance(row.get("text"), str):
        return layout_of("text", False)
    raise XverseError(
        f"{where} has no layout that is known.",
        f"Its first row has the columns {', '.join(map(str, row)) or 'none'}.",
        "Name the columns in a dataset_info.json, or use those of alpaca (instruction, output), "
        "ShareGPT (conversations), OpenAI (messages) or plain text (text).",
    )


def layout_of(kind: Kind, ranking: bool) -> Layout:
    """The layout of this kind whose columns have their usual names."""
    return Layout(kind, ranking, _used(COLUMNS[kind], ranking))


def _used(columns: Mapping[str, str], ranking: bool) -> dict[str, str]:
    unused = () if ranking else ("chosen", "rejected")
    return {ours: theirs for ours, theirs in columns.items() if ours not in unused}


def _holds_messages(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict)
    )
