"""Objectives: what is learned of pairs, in chunks; and noise, which is for training alone."""

import contextlib
import functools
import math

import pytest
import torch
from torch.nn import functional

from tests.train.tiny import tiny_decoder
from xverse.data.loader import Batch
from xverse.kernels.score import log_probabilities
from xverse.train import lora
from xverse.train.noise import noisy
from xverse.train.objective import Part, answers, dpo, pretrain
from xverse.train.options import Updating
from xverse.train.schedule import learning_rate
from xverse.train.tuning import Dpo, Lora


def pairs() -> Batch:
    """Two pairs of which the last half of each answer counts, and some padding."""
    documents = (6, 8, 5, 7, 3)
    positions = torch.cat([torch.arange(n) for n in documents])
    masks = [torch.arange(n) >= n // 2 for n in documents[:-1]]
    mask = torch.cat([*masks, torch.zeros(3, dtype=torch.bool)])
    ids = torch.arange(len(mask)) * 11 % 64
    return Batch(ids, (ids * 5 + 1) % 64, mask, positions, documents)


@pytest.mark.parametrize("rows", [3, 256])
def test_log_probabilities_and_their_gradients_in_chunks(rows: int) -> None:
    x_TD = torch.randn(10, 8, dtype=torch.float64).requires_grad_()
    head_VD = torch.randn(20, 8, dtype=torch.float64).requires_grad_()
    targets = torch.arange(10) * 3 % 20
    counts = torch.linspace(-1, 2, 10)
    found = []
    for call in (
        lambda: log_probabilities(x_TD, head_VD, targets, rows=rows),
        lambda: functional.log_softmax(x_TD @ head_VD.T, -1).gather(1, targets[:, None])[:, 0],
    ):
        x_TD.grad = head_VD.grad = None
        each = call()
        (each * counts).sum().backward()
        found.append((each.detach().float(), x_TD.grad.clone(), head_VD.grad.clone()))  # type: ignore[union-attr]
    for ours, plain in zip(*found, strict=True):
        assert torch.allclose(ours.double(), plain.double(), atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_preferences_by_the_formula(smoothing: float) -> None:
    batch, decoder = pairs(), lora.add_lora(tiny_decoder(), Lora())
    before = answers(decoder, batch).detach()
    for layer in lora.adapters(decoder).values():
        layer.b.data.normal_(0, 0.3)
    now = answers(decoder, batch)
    assert len(now) == 4  # the padding is no document of anybody's
    margin = 0.3 * ((now - before)[0::2] - (now - before)[1::2])
    expected = -(1 - smoothing) * margin.sigmoid().log() - smoothing * (-margin).sigmoid().log()
    options = Dpo(beta=0.3, label_smoothing=smoothing)
    found = dpo(decoder, batch, 2, reference=lora.switched_off, options=options)
    assert torch.allclose(found.loss, expected.sum() / 2, atol=1e-5)
    assert found.also["rewards.margin"] == pytest.approx(float(margin.mean()), abs=1e-5)
    assert found.also["rewards.accuracy"] == float((margin > 0).float().mean())
    found.loss.backward()
    assert all(layer.b.grad is not None for layer in lora.adapters(decoder).values())


def test_rows_without_pairs_count_for_nothing() -> None:
    ids = torch.zeros(2, dtype=torch.int64)
    empty = Batch(ids, ids, ids > 0, ids, (1, 1))
    decoder = tiny_decoder()
    objective = functools.partial(dpo, reference=contextlib.nullcontext, options=Dpo())
    assert float(objective(decoder, empty, 3).loss.detach()) == 0.0


def test_noise_is_bounded_and_for_training_alone() -> None:
    """Of a document of L tokens, at most alpha / sqrt(L x width) on any number."""
    decoder, batch = tiny_decoder(), pairs()
    seen: list[torch.Tensor] = []
    plain = decoder.model.embed_tokens(batch.ids).detach()

    def look(decoder: object, batch: Batch, _units: int) -> Part:
        seen.append(decoder.model.embed_tokens(batch.ids).detach() - plain)  # type: ignore[attr-defined]
        return Part(torch.zeros(()), {})

    noisy(look, 5.0)(decoder.train(), batch, 1)
    noisy(look, 5.0)(decoder.eval(), batch, 1)
    for noise, length in zip(seen[0].split(batch.documents), batch.documents, strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.8 * bound < noise.abs().max() <= bound + 1e-6
    assert not seen[1].any()
    decoder.train()
    a, b = (float(noisy(pretrain, 5.0)(decoder, batch, 10).loss.detach()) for _ in range(2))
    assert a != b


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_the_schedule_of_transformers(kind: str) -> None:
    """A rate of zero in the first step of a warm-up, and of zero after the last step."""
    options = Updating(
        schedule=kind,  # type: ignore[arg-type]
        first_step=0,
        warmup_steps=4,
        lowest_share=0.0,
        learning_rate=1.0,
    )
    rates = [learning_rate(step, 12, options) for step in range(12)]
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    done = [(step - 4) / 8 for step in range(5, 12)]
    after = [0.5 * (1 + math.cos(math.pi * d)) if kind == "cosine" else 1 - d for d in done]
    assert rates[5:] == pytest.approx(after)
