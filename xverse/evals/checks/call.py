"""ANSWER -> JUDGEMENT. Whether an answer calls the right function, or rightly none."""

from collections.abc import Mapping, Sequence

from xverse.evals.checks.words import fold
from xverse.evals.item import Judgement
from xverse.text.tools import START, parse_tool_calls


def calls(answer: str, name: str, arguments: Mapping[str, Sequence[object]]) -> Judgement:
    """There is one call, of `name`, with these arguments and no others; each argument has the
    values that are right, of which a text may differ in case and spaces."""
    found = parse_tool_calls(answer).tool_calls
    if len(found) != 1:
        return Judgement(False, f"has {len(found)} function calls instead of one")
    call = found[0]
    if call.name != name:
        return Judgement(False, f"calls {call.name!r:.80} instead of {name}")
    if call.arguments.keys() != arguments.keys():
        given = ", ".join(call.arguments) or "none"
        return Judgement(False, f"calls {name} with the arguments {given:.80}")
    for key, right in arguments.items():
        if not any(_same(call.arguments[key], value) for value in right):
            return Judgement(False, f"calls {name} with {key} = {call.arguments[key]!r:.80}")
    return Judgement(True, f"calls {name} rightly")


def no_call(answer: str) -> Judgement:
    """It calls nothing, not even in a way that cannot be read, and does say something."""
    if START in answer or parse_tool_calls(answer).tool_calls:
        return Judgement(False, "calls a function where there is no need to")
    return Judgement(bool(answer.strip()), "calls nothing" if answer.strip() else "is empty")


def _same(given: object, right: object) -> bool:
    if isinstance(given, str) and isinstance(right, str):
        return fold(given) == fold(right)
    return given == right and isinstance(given, bool) == isinstance(right, bool)
