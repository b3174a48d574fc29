"""BENCHMARK -> ITEMS. One question of a benchmark, and the benchmark: data, and one function."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from xverse.errors import XverseError

# What is read of the model: the likeliest of some options, a text that it writes, how well it
# foretells a text that is given, or what it answers in a conversation.
Kind = Literal["choice", "writing", "text", "dialogue"]
# By what the log-probabilities of options are divided before they are compared.
Norm = Literal["none", "characters"]
LETTERS = "ABCDEFGHIJKLMNOP"


@dataclass(frozen=True)
class Item:
    """One question. Its prompt is header, shots and question, one after another, to the byte.

    Of `options` one is the `gold` one; where `stems` are given they stand in the question's place,
    one for each option. In a dialogue the question is what is said first, and `turns` are what is
    said after each answer. `reference` is whatever the task's `grade` or `judge` wants to know.
    """

    name: str
    question: str
    group: str = ""
    header: str = ""
    shots: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    stems: tuple[str, ...] = ()
    gold: int = -1
    reference: Mapping[str, object] = field(default_factory=dict, hash=False)
    turns: tuple[str, ...] = ()

    def prompt(self, shots: int, stem: str | None = None) -> str:
        """The text before the answer, with the first `shots` of the examples."""
        return self.header + "".join(self.shots[:shots]) + (stem or self.question)

    def facts(self) -> dict[str, object]:
        """The item as JSON; equal items, and no others, give equal facts."""
        facts = {**self.__dict__, "reference": dict(self.reference)}
        if not self.turns:  # so that what was asked before there were turns keeps its hash
            del facts["turns"]
        return facts


@dataclass(frozen=True)
class Judgement:
    """Whether an answer is right, and what was found in it that says so."""

    passed: bool
    reason: str


Load = Callable[[Path, int], Iterable[Item]]
Grade = Callable[[Item, str], float]
Judge = Callable[[Item, Sequence[str]], Judgement]


@dataclass(frozen=True)
class Task:
    """A benchmark. `load(folder, shots)` gives its items from the original files in `folder`.

    `categories` names the category of each group. `grade` says from 0 to 1 how right a written
    answer is, and `judge` whether the answers of a dialogue are right and why; dialogues are always
    held in the model's chat format. `cut` "middle": a prompt that is too long loses its middle, as
    published; else examples are left out, and if that does not do, the item counts as wrong. `note`
    is printed wherever the figure is.
    """

    name: str
    title: str
    kind: Kind
    load: Load
    folder: str = ""
    shots: int = 0
    norm: Norm = "none"
    greedy: bool = False  # right is what greedy decoding would write, not the likeliest option
    grade: Grade | None = None
    judge: Judge | None = None
    max_tokens: int = 0
    stop: tuple[str, ...] = ()
    cut: Literal["shots", "middle"] = "shots"
    categories: Mapping[str, str] = field(default_factory=dict, hash=False)
    by_group: bool = False  # the mean over groups is the figure, not the one over items
    sandboxed: bool = False  # answers are programs that will be run
    note: str = ""

    def __post_init__(self) -> None:
        assert (self.kind == "writing") == (self.grade is not None), "who writes is graded"
        assert (self.kind == "dialogue") == (self.judge is not None), "who converses is judged"
        written = self.kind in ("writing", "dialogue")
        assert written == (self.max_tokens > 0), "an answer has a length"

    def items(self, data: Path, shots: int | None = None) -> list[Item]:
        """All items, from the task's folder inside `data`; XverseError where they are not there."""
        try:
            found = list(self.load(data / self.folder, self.shots if shots is None else shots))
        except FileNotFoundError as error:
            raise XverseError(
                f"The data of {self.title} is not in {data / self.folder}.",
                f"{error.filename} is missing.",
                "Name the folder of the benchmarks with --data, or fetch it with --fetch where "
                "a hub has it; docs/evaluate.md tells the layout of every task.",
            ) from error
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise XverseError(
                f"The data of {self.title} in {data / self.folder} is damaged.",
                f"{type(error).__name__}: {error}",
                "Take the original files again; docs/evaluate.md tells where they are.",
            ) from error
        if not found:
            raise XverseError(
                f"The data of {self.title} in {data / self.folder} is empty.",
                "There is no question in it that the task asks.",
                "Take the original files again.",
            )
        assert len({item.name for item in found}) == len(found), "names are unique"
        return found


def digest(*values: object) -> str:
    """16 hexadecimal digits of the sha256 of JSON values."""
    text = json.dumps(values, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def lettered(question: str, choices: Sequence[str]) -> str:
    """A question and its choices as hendrycks/test has them, up to "Answer:" without a space."""
    lines = [f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return f"{question}{''.join(lines)}\nAnswer:"


def labels(count: int) -> tuple[str, ...]:
    """The answers that are compared: " A", " B" and so on."""
    return tuple(f" {letter}" for letter in LETTERS[:count])
