"""Choosing tokens: equal to Hugging Face's processors, and fair to the probabilities."""

import pytest
import torch

from xverse.engine import sampler
from xverse.engine.request import Sampling
from xverse.engine.sampler import Sampler
from xverse.errors import XverseError
from xverse.kernels import reference_sample

transformers = pytest.importorskip("transformers")
process = transformers.generation.logits_process


def scores(seed: int = 0, size: int = 200) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("seed", range(5))
def test_filters_equal_hugging_face(seed: int) -> None:
    x = scores(seed)
    pairs = [
        (reference_sample.keep_top_k(x, 7), process.TopKLogitsWarper(7)),
        (reference_sample.keep_top_k(x, 10**6), process.TopKLogitsWarper(10**6)),
        (reference_sample.keep_top_p(x, 0.85), process.TopPLogitsWarper(0.85)),
        (reference_sample.keep_top_p(x, 1e-6), process.TopPLogitsWarper(1e-6)),
        (reference_sample.keep_min_p(x, 0.05), process.MinPLogitsWarper(0.05)),
    ]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs(None, x[None].clone())[0])


@pytest.mark.parametrize("penalty", [0.7, 1.1, 2.0])
def test_repetition_penalty_equals_hugging_face(penalty: float) -> None:
    seen = [3, 5, 5, 199, 0]
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)
    expected = theirs(torch.tensor([seen]), scores()[None].clone())[0]
    assert torch.equal(sampler.penalize_repetition(scores(), seen, penalty), expected)


def test_whole_chain_has_hugging_face_probabilities() -> None:
    """Published chat settings: the same distribution, hence the same order of the steps."""
    x, seen = scores(3), [1, 2, 150]
    chain = transformers.LogitsProcessorList(
        [
            process.RepetitionPenaltyLogitsProcessor(1.1),
            process.TemperatureLogitsWarper(0.5),
            process.TopKLogitsWarper(30),
            process.TopPLogitsWarper(0.85),
        ]
    )
    expected = chain(torch.tensor([seen]), x[None].clone()).softmax(-1)[0]
    options = Sampling(temperature=0.5, top_k=30, top_p=0.85, repetition_penalty=1.1, seed=1)
    chooser = Sampler(options.over({}))
    draws = torch.tensor([chooser.choose(x, seen) for _ in range(4000)])
    frequencies = torch.bincount(draws, minlength=200) / 4000
    assert set(draws.tolist()) <= set(expected.nonzero()[:, 0].tolist())
    # Four standard deviations of a binomial frequency.
    spread = (expected * (1 - expected) / 4000).sqrt()
    assert ((frequencies - expected).abs() <= 4 * spread + 1e-3).all()


def test_temperature_zero_is_greedy_and_top_k_zero_is_off() -> None:
    x = scores()
    for options in ({"temperature": 0.0, "top_k": 0}, {"temperature": 0.0, "top_p": 0.1}):
        assert Sampler(Sampling(**options).over({})).choose(x, []) == int(x.argmax())
    many = Sampler(Sampling(temperature=5.0, top_k=0, seed=0).over({}))
    assert len({many.choose(x, []) for _ in range(200)}) > 50


def test_seed_repeats_and_no_seed_does_not() -> None:
    x = torch.zeros(1000)
    options = Sampling(temperature=1.0, seed=5).over({})
    runs = [[one.choose(x, []) for _ in range(8)] for one in (Sampler(options), Sampler(options))]
    assert runs[0] == runs[1]
    free = Sampling(temperature=1.0).over({})
    assert [Sampler(free).choose(x, []) for _ in range(8)] != runs[0]


def test_numbers_that_are_none_are_an_error_in_words() -> None:
    x = torch.full((10,), float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(XverseError, match="NaN"):
            Sampler(Sampling(temperature=temperature).over({})).choose(x, [])


def test_extreme_logits_still_choose() -> None:
    x = torch.full((10,), float("-inf"))
    x[4] = 1e30
    assert Sampler(Sampling(temperature=0.01, top_p=0.5).over({})).choose(x, []) == 4


def test_presence_and_frequency_count_the_answer_alone() -> None:
    """OpenAI's definition: logit - count * frequency - (count > 0) * presence."""
    x, seen = torch.zeros(6), [0, 0, 0, 2, 2, 3]
    x[5] = -2.0
    options = Sampling(presence_penalty=0.5, frequency_penalty=0.25).over({})
    expected = torch.tensor([0.0, 0.0, -1.0, -0.75, 0.0, -2.0])
    assert torch.equal(Sampler(options)._changed(x, seen, seen[3:]), expected)
    assert Sampler(options).choose(x, [0, 1, 4], 0) == 2  # all others but 3 and 5 came already


def test_bias_moves_the_choice_and_unknown_ids_are_refused() -> None:
    x = scores()
    best = int(x.argmax())
    banned = Sampler(Sampling(logit_bias={best: -100.0}).over({})).choose(x, [])
    assert banned == int(x.topk(2).indices[1])
    assert Sampler(Sampling(logit_bias={7: 100.0}).over({})).choose(x, []) == 7
    with pytest.raises(XverseError, match="no token 200"):
        Sampler(Sampling(logit_bias={200: 1.0}).over({})).choose(x, [])


def test_end_ids_do_not_come_before_min_tokens() -> None:
    x = torch.tensor([3.0, 2.0, 1.0])
    chooser = Sampler(Sampling(min_tokens=2, stop_ids=(1,)).over({}), end_ids={0})
    assert [chooser.choose(x, [5, *[2] * n], 1) for n in range(3)] == [2, 2, 0]


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "hot"},
        {"top_p": 1.5},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": float("inf")},
        {"repetition_penalty": 0},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"seed": 2**64},
        {"stop": ("",)},
        {"stop": (3,)},
        {"presence_penalty": 3},
        {"frequency_penalty": "much"},
        {"logit_bias": {1: 101}},
        {"logit_bias": {"a": 1}},
        {"logit_bias": [(1, 1)]},
        {"stop_ids": (-1,)},
        {"stop_ids": 1.5},
        {"min_tokens": -1},
        {"logprobs": 101},
    ],
)
def test_impossible_options_are_refused_in_words(bad: dict[str, object]) -> None:
    with pytest.raises(XverseError):
        Sampling(**bad)  # type: ignore[arg-type]


def test_model_defaults_lie_below_the_request() -> None:
    published = {"do_sample": True, "temperature": 0.5, "top_k": 30, "max_new_tokens": 2048}
    filled = Sampling(top_k=5, temperature=0.0).over(published)
    assert (filled.top_k, filled.temperature, filled.max_tokens) == (5, 0.0, 2048)
    assert Sampling().over(published).temperature == 0.5
    assert Sampling().over({"temperature": 0.5}).temperature == 0.0  # no do_sample: greedy
    assert Sampling().over({"do_sample": True}).temperature == 1.0
    with pytest.raises(XverseError, match=r"generation_config\.json"):
        Sampling().over({"do_sample": True, "temperature": "warm"})
