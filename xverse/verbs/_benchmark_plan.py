"""OPTIONS -> CELLS. What `xverse benchmark` will run, decided and checked before anything loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from xverse.errors import XverseError

if TYPE_CHECKING:
    from xverse.engine.measure import Measured, Steps
    from xverse.engine.request import Request

FIRST_TOKEN_PROMPTS: tuple[int, ...] = (128, 512, 2048)
CONCURRENCY: dict[str, tuple[int, ...]] = {
    "cuda": (1, 8, 64),
    "cpu": (1, 4, 16),
}  # 64 at once would take a CPU minutes
TOKENS = {"fixed": (128, 128), "uniform": (100, 1024)}
REQUESTS_EACH = {"fixed": 1, "uniform": 4}  # for each of those that run at once

Workload = Literal["fixed", "uniform"]
Range = tuple[int, int]


@dataclass(frozen=True)
class Cell:
    """One figure of every runner: these requests, at most `concurrency` of them at once.

    Kind "first" has answers of one token; "load" is everything else.
    """

    kind: Literal["first", "load"]
    concurrency: int
    requests: "tuple[Request, ...]"

    def measure(self, steps: "Steps", round_name: str) -> "Measured":
        """Run it once. No round finds pages of an earlier one."""
        from xverse.engine.measure import measure_throughput
        from xverse.engine.workload import apart

        name = f"{self.kind} {self.concurrency} {len(self.requests[0].ids)} {round_name}"
        some = apart(self.requests, name)
        return measure_throughput(steps, some, concurrency=self.concurrency)


@dataclass(frozen=True)
class Plan:
    """Numbers as the options mean them for one model on one device."""

    workload: Workload
    prompt_tokens: Range
    new_tokens: Range
    first_token_prompts: tuple[int, ...]
    concurrency: tuple[int, ...]
    requests: int | None

    @property
    def longest(self) -> int:
        """Tokens of prompt and answer together that any request may have."""
        loads = self.prompt_tokens[1] + self.new_tokens[1]
        return max(loads, *(tokens + 1 for tokens in self.first_token_prompts), 2)

    def requests_at(self, concurrency: int) -> int:
        """How many requests a cell of this concurrency has."""
        return self.requests or REQUESTS_EACH[self.workload] * concurrency

    def cells(self, vocabulary: int, temperature: float) -> list[Cell]:
        """Every cell with its requests; those of one length or load are the same in every run."""
        from xverse.engine.workload import make_requests

        cells = []
        for tokens in self.first_token_prompts:
            one = make_requests(
                1, (tokens, tokens), (1, 1), vocabulary=vocabulary, temperature=temperature
            )
            cells.append(Cell("first", 1, tuple(one)))
        for concurrency in self.concurrency:
            some = make_requests(
                self.requests_at(concurrency),
                self.prompt_tokens,
                self.new_tokens,
                vocabulary=vocabulary,
                temperature=temperature,
            )
            cells.append(Cell("load", concurrency, tuple(some)))
        return cells


def make_plan(
    *,
    workload: Workload,
    prompt_tokens: str | None,
    new_tokens: str | None,
    first_token_prompts: str | None,
    concurrency: str | None,
    requests: int | None,
    device: str,
    context: int,
) -> Plan:
    """The plan for a model of this context on this kind of device; XverseError for what is no
    number, or longer than the context. Batch 1 is always measured."""
    prompts, news = (
        _range(option, text, workload)
        for option, text in (("prompt-tokens", prompt_tokens), ("new-tokens", new_tokens))
    )
    wanted = FIRST_TOKEN_PROMPTS
    if first_token_prompts is None:
        wanted = tuple(tokens for tokens in wanted if tokens < context)
    else:
        wanted = numbers("first-token-prompts", first_token_prompts)
    at_once = CONCURRENCY[device]
    if concurrency is not None:
        at_once = numbers("concurrency", concurrency)
    if requests is not None and requests < 1:
        raise _no_number("requests", str(requests), "one whole number from 1 on")
    plan = Plan(workload, prompts, news, wanted, tuple(sorted({1, *at_once})), requests)
    if plan.longest > context:
        raise XverseError(
            f"A request of {plan.longest} tokens is longer than the model's context.",
            f"It holds {context} tokens of prompt and answer together.",
            "Lower --prompt-tokens, --new-tokens or --first-token-prompts.",
        )
    return plan


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, between commas; XverseError for anything else."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise _no_number(option, text, "whole numbers from 1 on, as in 1,8,64")
    return tuple(map(int, parts))


def _range(option: str, text: str | None, workload: Workload) -> Range:
    if text is None:
        return TOKENS[workload]
    ends: Sequence[int] = [int(part) for part in text.split("-") if part.strip().isdecimal()]
    count = 2 if workload == "uniform" else 1
    good = len(ends) == count == len(text.split("-")) and 0 < ends[0] <= ends[-1]
    if not good:
        example = {"fixed": "one length, as in 128", "uniform": "a range, as in 100-1024"}
        raise _no_number(option, text, f"{example[workload]} (--workload {workload})")
    return ends[0], ends[-1]


def _no_number(option: str, text: str, wanted: str) -> XverseError:
    return XverseError(
        f"--{option} cannot be {text!r:.60}.", f"It takes {wanted}.", "Correct the option."
    )
