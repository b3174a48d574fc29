"""ANSWERS -> JUDGEMENT. The checks that an example names, and what comes of all of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from xverse.evals.checks.call import calls, no_call
from xverse.evals.checks.language import language
from xverse.evals.checks.program import python
from xverse.evals.checks.refusal import refuses
from xverse.evals.checks.words import number, picks, says, varied
from xverse.evals.item import Item, Judgement

# Each takes an answer and what the item says about it, and looks at nothing else.
CHECKS: Mapping[str, Callable[..., Judgement]] = {
    check.__name__: check
    for check in (says, number, picks, varied, language, python, refuses, calls, no_call)
}

MAX_CHARACTERS = 20_000  # eight times what an answer has room for: so no pattern takes long


def judge(item: Item, answers: Sequence[str]) -> Judgement:
    """Whether every check of the item holds: of the answer to its `turn` (from 1), else of the last
    one. The reason is the first check that fails, or what all of them found."""
    found: list[str] = []
    for check in cast(Sequence[Mapping[str, Any]], item.reference["checks"]):
        facts = dict(check)
        turn = facts.pop("turn", len(answers))
        check_of, answer = CHECKS[facts.pop("check")], answers[turn - 1]
        if len(answer) > MAX_CHARACTERS:
            judgement = Judgement(False, f"has more than {MAX_CHARACTERS} characters")
        else:
            judgement = check_of(answer, **facts)
        where = f"turn {turn} " if len(answers) > 1 else ""
        if not judgement.passed:
            return Judgement(False, where + judgement.reason)
        found.append(where + judgement.reason)
    return Judgement(True, "; ".join(found))
