"""Decisions: probabilities are the softmax of the labels' log-probabilities, in every form."""

import math
from pathlib import Path

import httpx
import pytest

from xverse import LLM

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, dtype="float32")


def decide(http: httpx.Client, **body: object) -> dict:  # type: ignore[type-arg]
    answer = http.post("/v1/decisions", json={"model": "tiny", **body})
    assert answer.status_code == 200, answer.text
    found: dict = answer.json()  # type: ignore[type-arg]
    return found


def test_a_choice_is_the_softmax_of_the_scores(http: httpx.Client, llm: LLM) -> None:
    options = ["Yes", "no", "天气"]
    found = decide(http, prompt="Is it?", decision={"type": "choice", "options": options})
    scores = llm.score("Is it?", options)
    assert [row["logprob"] for row in found["labels"]] == pytest.approx(scores, rel=1e-4)
    weights = [math.exp(score) for score in scores]
    shares = [weight / sum(weights) for weight in weights]
    assert [row["probability"] for row in found["labels"]] == pytest.approx(shares, rel=1e-3)
    assert found["result"]["label"] == options[shares.index(max(shares))]
    assert found["end"] is False


def test_a_predicate_gives_the_probability_of_yes(http: httpx.Client) -> None:
    found = decide(http, messages=HELLO, decision={"type": "predicate"})
    assert found["result"]["probability"] == found["labels"][0]["probability"]
    assert [row["label"] for row in found["labels"]] == ["yes", "no"]
    turned = decide(
        http, messages=HELLO, decision={"type": "predicate", "true": "no", "false": "yes"}
    )
    assert turned["result"]["probability"] == pytest.approx(1 - found["result"]["probability"])
    assert turned["result"]["value"] != found["result"]["value"]


def test_a_score_is_the_expected_value(http: httpx.Client) -> None:
    levels = [{"label": word, "value": value} for value, word in enumerate(["a", "b", "c"])]
    found = decide(http, messages=HELLO, decision={"type": "score", "levels": levels})
    shares = [row["probability"] for row in found["labels"]]
    assert sum(shares) == pytest.approx(1)
    assert found["result"]["expected"] == pytest.approx(shares[1] + 2 * shares[2])


def test_where_one_label_begins_another_the_end_is_scored(http: httpx.Client) -> None:
    decision = {"type": "choice", "options": ["1", "10"]}
    found = decide(http, prompt="n", decision=decision)
    assert found["end"] is True
    bare = decide(http, prompt="n", decision=decision, end=False)
    # Without its end, the shorter one holds whatever goes on with it.
    assert bare["labels"][0]["logprob"] > bare["labels"][1]["logprob"]
    assert found["labels"][0]["logprob"] < bare["labels"][0]["logprob"]


@pytest.mark.parametrize(
    "body",
    [
        {"decision": {"type": "predicate"}},
        {"prompt": "a", "messages": HELLO, "decision": {"type": "predicate"}},
        {"prompt": "a", "decision": {"type": "choice", "options": ["a"]}},
        {"prompt": "a", "decision": {"type": "choice", "options": ["a", "a"]}},
        {"prompt": "a", "decision": {"type": "choice", "options": ["a", ""]}},
        {"prompt": "a", "decision": {"type": "choice", "options": ["a"] * 129}},
        {"prompt": "a", "decision": {"type": "guess"}},
        {"prompt": "", "decision": {"type": "predicate"}},
        {"prompt": "a" * 300, "decision": {"type": "predicate"}},
        {"prompt": "a", "decision": {"type": "predicate"}, "temperature": 1},
    ],
    ids=lambda body: str(body)[:50],
)
def test_what_cannot_be_decided_is_refused(http: httpx.Client, body: dict[str, object]) -> None:
    answer = http.post("/v1/decisions", json={"model": "tiny", **body})
    assert answer.status_code == 400, answer.text
