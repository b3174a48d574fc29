"""QUESTION -> PROBABILITIES. POST /v1/decisions: which of some labels the model would answer."""

import math
import time
import uuid
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from xverse.engine.request import Request
from xverse.server.context import Context
from xverse.server.logprobs import number
from xverse.server.refusals import invalid, json_response
from xverse.server.schema import Messages, Name, Strict

Label = Annotated[str, Field(min_length=1, max_length=1024)]


class Predicate(Strict):
    """A yes-or-no question: how likely is yes."""

    type: Literal["predicate"]
    true: Label = "yes"
    false: Label = "no"

    def labels(self) -> list[str]:
        """All answers there can be."""
        return [self.true, self.false]

    def result(self, probabilities: list[float]) -> dict[str, Any]:
        """What was decided."""
        return {"probability": probabilities[0], "value": probabilities[0] > 0.5}


class Choice(Strict):
    """One of several labels: which is the likeliest."""

    type: Literal["choice"]
    options: Annotated[list[Label], Field(min_length=2, max_length=128)]

    def labels(self) -> list[str]:
        """All answers there can be."""
        return self.options

    def result(self, probabilities: list[float]) -> dict[str, Any]:
        """What was decided."""
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        return {"label": self.options[best], "probability": probabilities[best]}


class Level(Strict):
    """A label, and the number that it stands for."""

    label: Label
    value: Annotated[float, Field(ge=-1e9, le=1e9)]


class Score(Strict):
    """Labels that stand for numbers: which number is to be expected."""

    type: Literal["score"]
    levels: Annotated[list[Level], Field(min_length=2, max_length=128)]

    def labels(self) -> list[str]:
        """All answers there can be."""
        return [level.label for level in self.levels]

    def result(self, probabilities: list[float]) -> dict[str, Any]:
        """What was decided."""
        pairs = list(zip(probabilities, (level.value for level in self.levels), strict=True))
        mean = sum(p * value for p, value in pairs)
        variance = sum(p * (value - mean) ** 2 for p, value in pairs)
        return {"expected": mean, "deviation": math.sqrt(variance)}


class DecisionRequest(Strict):
    """POST /v1/decisions. The labels are scored after `messages`, or after a plain `prompt`.

    `end`: whether the end of the answer is scored with each label; by default, where one label
    begins another ("1" and "10"), since the shorter would otherwise count the longer in.
    """

    model: Name
    messages: Messages | None = None
    prompt: str | None = None
    decision: Annotated[Predicate | Choice | Score, Field(discriminator="type")]
    end: bool | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


async def decide(context: Context, asked: DecisionRequest) -> Response:
    """How likely each label is, and what follows from it."""
    context.service.models.require(asked.model)
    labels = asked.decision.labels()
    if len({*labels}) < len(labels):
        raise invalid("Two labels are the same.", "decision")
    texts = await _scored_ids(context, asked, labels)
    end = asked.end
    if end is None:
        end = _one_begins_another([ids[start:] for ids, start in texts])
    requests = [
        Request(
            tuple(_ended(context, ids) if end else ids),
            None,
            score_from=start,
            adapter=context.service.models.adapter(asked.model),
        )
        for ids, start in texts
    ]
    longest = max(len(request.ids) for request in requests)
    if longest > context.service.context:
        raise invalid(
            f"With its longest label the prompt has {longest} tokens; this model's context holds "
            f"{context.service.context}.",
            "messages" if asked.messages is not None else "prompt",
            "context_length_exceeded",
        )
    work = context.service.scores(context.tenant, requests, context.facts)
    logprobs = [number(sum(scores.logprobs)) for scores in await context.attend(work)]
    highest = max(logprobs)
    weights = [math.exp(logprob - highest) for logprob in logprobs]
    probabilities = [weight / sum(weights) for weight in weights]
    rows = [
        {"label": label, "probability": probability, "logprob": logprob}
        for label, probability, logprob in zip(labels, probabilities, logprobs, strict=True)
    ]
    tokens = sum(len(request.ids) for request in requests)
    return json_response(
        {
            "id": f"decision-{uuid.uuid4().hex}",
            "object": "decision",
            "created": int(time.time()),
            "model": asked.model,
            "type": asked.decision.type,
            "result": asked.decision.result(probabilities),
            "labels": rows,
            "end": end,
            "usage": {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens},
        }
    )


async def _scored_ids(
    context: Context, asked: DecisionRequest, labels: list[str]
) -> list[tuple[list[int], int]]:
    """Prompt and label as ids for each label, and where the label begins."""
    service = context.service
    if (asked.messages is None) == (asked.prompt is None):
        raise invalid("Give either messages or a prompt.", "messages")
    if asked.messages is not None:
        ids = await service.render(
            [message.plain() for message in asked.messages], None, asked.model
        )
        answers = [await service.encode(label, add_special=False) for label in labels]
        return [([*ids, *answer], len(ids)) for answer in answers]
    prompt = asked.prompt or ""
    alone = await service.encode(prompt)
    found = []
    for label in labels:
        # As one text: where that changes the prompt's last tokens, they are scored too.
        ids = await service.encode(prompt + label)
        found.append((ids, await run_in_threadpool(_parting, alone, ids)))
    if any(start == 0 for _, start in found):
        raise invalid("The prompt has no token before the labels.", "prompt")
    return found


def _parting(one: list[int], other: list[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _one_begins_another(labels: list[list[int]]) -> bool:
    ordered = sorted(labels)  # then whoever is begun by another stands right behind one that does
    return any(b[: len(a)] == a for a, b in pairwise(ordered))


def _ended(context: Context, ids: list[int]) -> list[int]:
    end = context.service.tokenizer.eos_id
    if end is None:
        raise invalid("This model has no token that ends an answer; set end to false.", "end")
    return [*ids, end]
