"""The choice for all rows at once is that of `Sampler` for each, whatever the options."""

import random
from collections import Counter

import pytest
import torch
from torch import Tensor

from xverse.engine.device_sampler import DeviceSampler, Picked, Row
from xverse.engine.request import Sampling
from xverse.engine.sampler import Sampler
from xverse.errors import XverseError

VOCAB, CPU = 50, torch.device("cpu")


def seeded(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(sum(size) + seed)) * 2


def random_options(chance: random.Random, *, greedy: bool = False) -> Sampling:
    def maybe(value: object, neutral: object) -> object:
        return value if chance.random() < 0.4 else neutral

    return Sampling(
        temperature=0.0 if greedy else chance.choice([0.0, 0.3, 0.7, 1.0, 1.5]),
        top_k=maybe(chance.randint(1, 80), 0),  # type: ignore[arg-type]
        top_p=maybe(chance.random(), 1.0),  # type: ignore[arg-type]
        min_p=maybe(chance.random() / 4, 0.0),  # type: ignore[arg-type]
        repetition_penalty=maybe(chance.choice([0.7, 1.1, 2.0]), 1.0),  # type: ignore[arg-type]
        presence_penalty=maybe(chance.uniform(-2, 2), 0.0),  # type: ignore[arg-type]
        frequency_penalty=maybe(chance.uniform(-2, 2), 0.0),  # type: ignore[arg-type]
        logit_bias=maybe({3: -100.0, 7: 2.5, 11: -1.25}, None),  # type: ignore[arg-type]
        min_tokens=maybe(chance.randint(1, 6), 0),  # type: ignore[arg-type]
        stop_ids=(5, 7),
        seed=chance.randrange(2**31),
    ).over({})


@pytest.mark.parametrize("seed", range(12))
def test_requests_come_and_go_and_each_gets_its_own_tokens(seed: int) -> None:
    """Slots are taken in any order, given back, and taken again in the middle of an answer."""
    chance = random.Random(seed)
    together = DeviceSampler(6, VOCAB, CPU)
    running: dict[int, tuple[Sampler, Sampler, list[int], int]] = {}  # slot: its twins, ids, prompt
    for step in range(30):
        for slot in range(6):
            if slot not in running and chance.random() < 0.5:
                options = random_options(chance, greedy=seed % 3 == 0)
                prompt = [chance.randrange(VOCAB) for _ in range(chance.randint(1, 9))]
                twins = Sampler(options, {1}), Sampler(options, {1})
                running[slot] = *twins, prompt, len(prompt)
                together.enter(slot, twins[0], prompt)
            elif slot in running and chance.random() < 0.1:
                ours, twin, ids, start = running.pop(slot)
                together.leave(slot)
                free = [other for other in range(6) if other not in running]
                back = chance.choice(free)
                running[back] = ours, twin, ids, start
                together.enter(back, ours, ids[:start], ids[start:])
        slots = chance.sample(sorted(running), chance.randint(0, len(running)))
        if not slots:
            continue
        dtype = chance.choice([torch.float32, torch.bfloat16])
        logits_BV = seeded(len(slots), VOCAB, seed=1000 * seed + step).to(dtype)
        before = logits_BV.clone()
        rows = [Row(slot, len(running[slot][2]) - running[slot][3]) for slot in slots]
        picked = together.choose(logits_BV, torch.tensor(slots), rows)
        assert torch.equal(logits_BV, before)
        for slot, logits_V, id in zip(slots, logits_BV, picked.ids_B.tolist(), strict=True):
            _, twin, ids, start = running[slot]
            assert id == twin.choose(logits_V, ids, start)
            ids.append(id)


def alone(options: Sampling, logits_BV: Tensor, masks_BW: Tensor | None = None) -> Picked:
    sampler = DeviceSampler(4, VOCAB, CPU)
    slots = range(len(logits_BV))
    for slot in slots:
        sampler.enter(slot, Sampler(options.over({})), [0])
    return sampler.choose(logits_BV, torch.tensor(slots), [Row(s, 0) for s in slots], masks_BW)


def test_what_is_sent_once_is_sent_again_when_it_changes() -> None:
    sampler, logits_BV = DeviceSampler(1, 3, CPU), torch.tensor([[3.0, 2.0, 1.0]])

    def chosen(answer_tokens: int) -> int:
        return int(sampler.choose(logits_BV, torch.zeros(1).long(), [Row(0, answer_tokens)]).ids_B)

    options = Sampling(min_tokens=2, stop_ids=(0,), logit_bias={2: 0.5})
    sampler.enter(0, Sampler(options.over({})), [1])
    assert [chosen(count) for count in range(4)] == [1, 1, 0, 0]  # held off twice
    sampler.leave(0)
    sampler.enter(0, Sampler(Sampling(logit_bias={2: 5.0}).over({})), [1])
    assert chosen(2) == 2


def test_what_is_not_allowed_is_not_chosen_and_other_changes_come_after() -> None:
    logits_BV = seeded(3, VOCAB)
    allowed = [{8, 9}, {31, 32}, set(range(VOCAB))]
    bits = torch.tensor([[v in some for v in range(64)] for some in allowed])
    words = (bits.view(3, 2, 32).long() << torch.arange(32)).sum(-1)
    masks_BW = words.to(torch.int32)
    expected = logits_BV.masked_fill(~bits[:, :VOCAB], float("-inf")).argmax(-1)
    before = logits_BV.clone()
    for options in (Sampling(), Sampling(logit_bias={40: 100.0}), Sampling(temperature=0.01)):
        ids_B = alone(options, logits_BV, masks_BW).ids_B
        assert torch.equal(ids_B[:2], expected[:2])
        assert torch.equal(logits_BV, before)
    assert alone(Sampling(logit_bias={40: 100.0}), logits_BV, masks_BW).ids_B[2] == 40


def test_log_probabilities_are_of_the_model_itself_and_only_for_those_who_ask() -> None:
    logits_BV = seeded(3, VOCAB)
    sampler = DeviceSampler(3, VOCAB, CPU)
    wanted = (2, None, 4)
    for slot, logprobs in enumerate(wanted):
        options = Sampling(temperature=0.5, logprobs=logprobs, logit_bias={slot: 50.0}, seed=1)
        sampler.enter(slot, Sampler(options.over({})), [9])
    picked = sampler.choose(logits_BV, torch.arange(3), [Row(slot, 0) for slot in range(3)])
    assert picked.ids_B.tolist() == [0, 1, 2]
    assert picked.logprobs_B is not None
    assert picked.top_ids_BN is not None
    assert picked.top_logprobs_BN is not None
    expected = logits_BV.log_softmax(-1)
    for row in (0, 2):
        assert picked.logprobs_B[row] == expected[row, row]
        top = expected[row].topk(4)
        assert torch.equal(picked.top_ids_BN[row], top.indices)
        assert torch.equal(picked.top_logprobs_BN[row], top.values)
    assert picked.logprobs_B[1].isnan()
    assert (picked.top_ids_BN[1] == -1).all()
    none = alone(Sampling(logprobs=0), logits_BV)
    assert none.logprobs_B is not None
    assert none.top_ids_BN is None
    assert alone(Sampling(), logits_BV).logprobs_B is None


def test_numbers_that_are_none_are_the_misfortune_of_one_row() -> None:
    logits_BV = seeded(3, VOCAB)
    logits_BV[1, 20] = float("nan")
    for options in (Sampling(), Sampling(temperature=1.0, repetition_penalty=1.1, logprobs=1)):
        ids = alone(options, logits_BV).ids_B.tolist()
        assert ids[1] == -1
        assert min(ids[0], ids[2]) >= 0


def test_greedy_without_changes_is_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    sampler = DeviceSampler(2, VOCAB, CPU)
    best = sampler._best

    def counted(logits_BV: Tensor) -> Tensor:
        calls["best"] += 1
        return best(logits_BV)

    monkeypatch.setattr(sampler, "_best", counted)
    for name in ("_sample", "_mask", "_penalize", "_count", "_upload"):
        monkeypatch.setattr(sampler, name, lambda *_, name=name: calls.update([name]))
    for slot in range(2):
        sampler.enter(slot, Sampler(Sampling(top_k=5).over({})), [1, 2])
    logits_BV = seeded(2, VOCAB)
    picked = sampler.choose(logits_BV, torch.arange(2), [Row(0, 3), Row(1, 0)])
    assert torch.equal(picked.ids_B, logits_BV.argmax(-1))
    assert calls == {"best": 1}


def test_ids_that_the_model_does_not_know_are_refused_on_entering() -> None:
    sampler = DeviceSampler(1, VOCAB, CPU)
    for options in (Sampling(logit_bias={VOCAB: 1.0}), Sampling(min_tokens=1, stop_ids=(VOCAB,))):
        with pytest.raises(XverseError, match=f"no token {VOCAB}"):
            sampler.enter(0, Sampler(options.over({})), [1])
    sampler.enter(0, Sampler(Sampling(stop_ids=(VOCAB,)).over({})), [1])  # it never comes
