"""QUESTIONS -> A MODEL -> ANSWERS. What the harness asks of a model, wherever that model is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class Prompt:
    """A text to be continued; with `chat` it is a message, to be answered in the chat format after
    what was said `before`: messages and their answers in turn."""

    text: str
    chat: bool = False
    before: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, object]]:
        """The conversation in OpenAI's form."""
        said = enumerate((*self.before, self.text))
        return [
            {"role": "assistant" if place % 2 else "user", "content": text} for place, text in said
        ]


@dataclass(frozen=True)
class Ask:
    """How likely is each of `options` after the prompt? All of them are told in one reading."""

    prompt: Prompt
    options: tuple[str, ...]
    greedy: bool = False


@dataclass(frozen=True)
class Reading:
    """Log-probability of each option; where asked for, whether greedy decoding would write it.

    A model that cannot be read is asked to write: then `said` is its answer, and the option that
    it named has 0, the others minus infinity.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...] = ()
    said: str | None = None


@dataclass(frozen=True)
class Foretold:
    """Sum of the log-probabilities of a text's tokens, and how many they are."""

    logprob: float
    tokens: int


class Door(Protocol):
    """A model that can be asked. What is asked with one `namespace` gives the same to the last bit
    whenever the same is asked with it again, whatever was asked before with others."""

    @property
    def facts(self) -> Mapping[str, object]:
        """What identifies the model in a report: its title, the hashes of weights and tokenizer."""
        ...

    @property
    def batch(self) -> int:
        """How many items are best asked at once."""
        ...

    @property
    def context(self) -> int | None:
        """How many tokens a prompt and its answer may have, None where that is not known."""
        ...

    @property
    def reads(self) -> Literal["scores", "letters"]:
        """Whether log-probabilities can be had, or only written answers."""
        ...

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """How many tokens each prompt has; 0 where nobody knows. Asked for the next prompts on a
        thread of its own while these are read or written."""
        ...

    def without_middle(self, text: str, tokens: int) -> str:
        """The text's first and last tokens, half of `tokens` each."""
        ...

    def read(self, asks: Sequence[Ask], namespace: str) -> list[Reading]:
        """Log-probabilities of the options of each."""
        ...

    def write(
        self, prompts: Sequence[Prompt], max_tokens: int, stop: Sequence[str], namespace: str
    ) -> list[str]:
        """The greedy continuation of each prompt."""
        ...

    def foretell(self, texts: Sequence[str], namespace: str) -> list[Foretold]:
        """How likely each whole text is, in windows of the context."""
        ...
