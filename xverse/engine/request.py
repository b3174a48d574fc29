"""WHAT IS ASKED, WHAT COMES BACK. Sampling options, and the pieces and answers of generation."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from xverse.engine.grammar import Grammar
from xverse.errors import XverseError
from xverse.log import warn_once
from xverse.text.chat import Cut
from xverse.text.tools import ToolCall

Finish = Literal["stop", "length"]
Top = tuple[tuple[int, float], ...]  # the best ids with their log-probabilities, best first

# Keys of generation_config.json that are answered elsewhere or say nothing of how to choose.
_WITHOUT_EFFECT = frozenset(
    {
        "_from_model_config",
        "bos_token_id",
        "do_sample",
        "eos_token_id",
        "max_length",
        "pad_token_id",
        "transformers_version",
        "use_cache",
    }
)
# Options of Hugging Face's that we do not have, at the value that turns each off.
_OFF: dict[str, tuple[object, ...]] = {
    "num_beams": (1, None),
    "typical_p": (1.0, None),
    "no_repeat_ngram_size": (0, None),
    "length_penalty": (1.0, None),
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None leaves an option to the model's generation_config.json.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. With a
    seed the same request gives the same answer, whatever runs beside it. presence_penalty and
    frequency_penalty (OpenAI's) count the answer's tokens, repetition_penalty the prompt's too.
    logit_bias adds to the logits of ids. stop_ids end an answer as the model's own end ids do, and
    neither comes before min_tokens. logprobs asks for the log-probability of each token and of
    that many best ones, by the model itself: before any of these options. prompt_logprobs asks the
    same for the prompt's tokens after the first. With echo the answer begins with the prompt.
    max_tokens 0 adds nothing to the prompt, and is for these two.
    that many best ones, by the model itself: before any of these options. With a grammar only
    tokens that it allows are chosen, and the answer ends where it does, whatever min_tokens says.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    stop_ids: tuple[int, ...] = ()
    min_tokens: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    grammar: Grammar | None = None

    def __post_init__(self) -> None:
        stop: object = self.stop  # what callers give may be one string, or a list
        object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(self.stop))
        stop_ids: object = self.stop_ids
        ids = tuple(self.stop_ids) if isinstance(stop_ids, Iterable) else (stop_ids,)
        object.__setattr__(self, "stop_ids", ids)
        _check(self, "max_tokens", whole=True, low=0, high=2**31)
        _check(self, "min_tokens", whole=True, low=0, high=2**31)
        _check(self, "temperature", low=0, high=100)
        _check(self, "top_k", whole=True, low=0, high=2**31)
        _check(self, "top_p", low=0, high=1)
        _check(self, "min_p", low=0, high=1)
        _check(self, "repetition_penalty", low=1e-3, high=1e3)
        _check(self, "presence_penalty", low=-2, high=2)
        _check(self, "frequency_penalty", low=-2, high=2)
        _check(self, "logprobs", whole=True, low=0, high=100)
        _check(self, "prompt_logprobs", whole=True, low=0, high=100)
        _check(self, "seed", whole=True, low=-(2**63), high=2**63 - 1)
        _check_ids("stop_ids", self.stop_ids)
        _check_bias(self.logit_bias)
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise XverseError(
                f"grammar cannot be {self.grammar!r:.60}.",
                "It says what an answer must look like.",
                "Give for example Grammar.json(), Grammar.regex(...) or Grammar.json_schema(...).",
            )
        if not all(isinstance(text, str) and text for text in self.stop):
            raise XverseError(
                f"A stop string is empty or no text: {self.stop!r:.80}.",
                "Generation ends where a stop string appears, and nothing appears everywhere.",
                "Give non-empty strings.",
            )
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise XverseError(
                "max_tokens 0 asks for nothing.",
                "No token may be added, and of the prompt nothing is wanted.",
                "Raise max_tokens, or ask for the prompt with prompt_logprobs or echo.",
            )

    def over(self, generation_config: Mapping[str, object]) -> "Sampling":
        """These options, and below them the model's own, and below those greedy and neutral."""
        _name_what_is_not_done(generation_config)
        own = sampling_of(generation_config)
        filled: dict[str, Any] = {
            option.name: _first(getattr(self, option.name), getattr(own, option.name), neutral)
            for option, neutral in zip(dataclasses.fields(self), _NEUTRAL, strict=True)
        }
        return Sampling(**filled)


# Keys of generation_config.json that are taken over, and our names.
_FROM_CONFIG = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
}
_NEUTRAL = (
    None,
    0.0,
    0,
    1.0,
    0.0,
    1.0,
    (),
    None,
    False,
    0.0,
    0.0,
    None,
    (),
    0,
    None,
    None,
    False,
    None,
)


def sampling_of(generation_config: Mapping[str, object]) -> Sampling:
    """The options that a generation_config.json sets; greedy unless it says do_sample."""
    chosen: dict[str, Any] = {
        name: generation_config.get(key) for key, name in _FROM_CONFIG.items()
    }
    if not generation_config.get("do_sample", False):
        chosen |= {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    elif chosen["temperature"] is None:
        chosen["temperature"] = 1.0  # Hugging Face's default where it samples
    try:
        return Sampling(**chosen)
    except XverseError as error:
        raise XverseError(
            "generation_config.json asks for the impossible.", error.what, "Correct that file."
        ) from error


@dataclass(frozen=True)
class Request:
    """A prompt to be continued. Pages of KV memory are shared only within a `namespace`.

    `sampling` must be filled and have max_tokens; with None nothing is added to the prompt.
    `score_from`: the log-probabilities of the prompt's tokens from this place on are wanted; it is
    1 where the sampling asks for prompt_logprobs. `score_best`: so many best ids beside each.
    `labels`: the log-probabilities of these ids as the token after the prompt are wanted, all of
    them from one reading of the prompt. `adapter` names one that the engine has loaded.
    """

    ids: tuple[int, ...]
    sampling: Sampling | None
    namespace: str = ""
    score_from: int | None = None
    score_best: int = 0
    labels: tuple[int, ...] = ()
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.sampling is not None and self.sampling.prompt_logprobs is not None:
            assert self.score_from in (None, 1), "all of the prompt is scored"
            object.__setattr__(self, "score_from", 1)

    @property
    def best_scored(self) -> int:
        """How many best ids are wanted beside each prompt token that is scored."""
        asked = (self.sampling.prompt_logprobs or 0) if self.sampling else 0
        return max(asked, self.score_best)

    @property
    def answers(self) -> bool:
        """Whether anything is to be added to the prompt."""
        return self.sampling is not None and self.sampling.max_tokens != 0


@dataclass(frozen=True)
class Token:
    """One decoded token of the prompt numbered `request`; `finish` on its last one.

    Where asked for: its log-probability, and the best ids with theirs. On the first token,
    `reused` is how many tokens of the prompt were found in shared pages instead of computed.
    """

    request: int
    id: int
    finish: Finish | None = None
    logprob: float | None = None
    top: Top = ()
    reused: int = 0


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of prompt tokens of `request`; `last` where no tokens follow.

    Where asked for, `tops` has for each of them the best ids with theirs, best first, and `labels`
    those of the request's labels after the prompt.
    """

    request: int
    logprobs: tuple[float, ...]
    last: bool
    tops: tuple[Top, ...] = ()
    labels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Failed:
    """The prompt numbered `request` got no further, for a reason that is its own."""

    request: int
    error: XverseError


@dataclass(frozen=True)
class Logprob:
    """A token, its bytes and its log-probability; `top` are the likeliest there, best first."""

    id: int
    bytes: bytes
    logprob: float
    top: tuple["Logprob", ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text that has become final, the tokens it came from, and on the last piece why it ended.

    Log-probabilities, where asked for, are of these tokens; the prompt's come with the first piece.
    `reused`: of the prompt's tokens, how many these tokens tell were found in shared pages.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish | None = None
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()
    reused: int = 0


@dataclass(frozen=True)
class Answer:
    """A whole answer. `cut` says what of the conversation did not fit, None where all of it did.

    With `Sampling.echo`, text and tokens begin with the prompt's. `logprobs` are those of the
    tokens that were added, `prompt_logprobs` those of the prompt's from its second on.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    tool_calls: tuple[ToolCall, ...] = ()
    cut: Cut | None = None
    logprobs: tuple[Logprob, ...] = ()
    prompt_logprobs: tuple[Logprob, ...] = ()


def _first(*values: object) -> object:
    return next((value for value in values if value is not None and value != ()), values[-1])


def _check(sampling: Sampling, name: str, *, low: float, high: float, whole: bool = False) -> None:
    value = getattr(sampling, name)
    if value is None:
        return
    if not _is_number(value, low, high) or (whole and not isinstance(value, int)):
        article = "a whole number" if whole else "a number"
        raise XverseError(
            f"{name} cannot be {value!r:.60}.",
            f"It is {article} from {low:g} to {high:g}.",
            f"Give such a number, or leave {name} out for the model's own.",
        )


def _is_number(value: object, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= cast(float, value) <= high


def _check_ids(name: str, ids: Collection[object]) -> None:
    if not all(type(id) is int and 0 <= id < 2**31 for id in ids):
        raise XverseError(
            f"{name} names something that is no token: {ids!r:.80}.",
            "Tokens are meant by their ids.",
            "Give whole numbers from 0 on; the tokenizer has them.",
        )


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    values = bias.values() if isinstance(bias, Mapping) else (None,)
    if not all(_is_number(value, -100, 100) for value in values):
        raise XverseError(
            f"logit_bias cannot be {bias!r:.80}.",
            "It gives ids a number from -100 to 100 each, which is added to their logits.",
            "Give for example {17: -100.0}.",
        )
    assert isinstance(bias, Mapping)
    _check_ids("logit_bias", bias.keys())


def _name_what_is_not_done(generation_config: Mapping[str, object]) -> None:
    for key, value in generation_config.items():
        if key in _FROM_CONFIG or key in _WITHOUT_EFFECT or value in _OFF.get(key, ()):
            continue
        warn_once(f"generation_config.json sets {key!r:.60}, which XVERSE leaves aside")
