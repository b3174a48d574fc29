"""The paged door gives the logits of the plain one, however tokens are cut and pages strewn."""

import random

import pytest
import torch

from tests.engine.tiny import VOCAB, dynamic_decoder, tiny_decoder
from xverse.engine.paged import Paged, Part
from xverse.errors import XverseError
from xverse.model.cache import Packed
from xverse.model.decoder import Decoder


def whole(decoder: Decoder, ids: list[int]) -> torch.Tensor:
    kv = Packed([len(ids)])
    return decoder(torch.tensor(ids), kv.positions(), kv)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_logit_as_if_alone(seed: int, dynamic: bool) -> None:
    chance = random.Random(seed)
    decoder = dynamic_decoder() if dynamic else tiny_decoder()
    size = chance.choice([1, 3, 16])
    texts = [[chance.randrange(VOCAB) for _ in range(chance.randint(2, 50))] for _ in range(5)]
    free = list(range(sum(-(-len(text) // size) for text in texts)))
    chance.shuffle(free)
    tables = [[free.pop() for _ in range(-(-len(text) // size))] for text in texts]
    kv = Paged(decoder.shape, sum(map(len, tables)), size, dtype=torch.float32)
    held = [0] * len(texts)
    while any(h < len(text) for h, text in zip(held, texts, strict=True)):
        live = [row for row in range(len(texts)) if held[row] < len(texts[row])]
        rows = chance.sample(live, chance.randint(1, len(live)))
        counts = [min(chance.choice([1, 1, 1, 7]), len(texts[r]) - held[r]) for r in rows]
        ids = [
            i for r, n in zip(rows, counts, strict=True) for i in texts[r][held[r] : held[r] + n]
        ]
        parts = [
            Part(tables[r], held[r], n, len(texts[r])) for r, n in zip(rows, counts, strict=True)
        ]
        logits = decoder(torch.tensor(ids), kv.begin(parts), kv).split(counts)
        for row, count, got in zip(rows, counts, logits, strict=True):
            expected = whole(decoder, texts[row])[held[row] : held[row] + count]
            held[row] += count
            assert torch.allclose(got, expected, atol=1e-4)


def test_tokens_that_come_apart_are_attended_to_as_if_one_by_one() -> None:
    """To the last bit of what attention mixes, in pages of 16; and what is erased is zero."""
    decoder, pages = tiny_decoder(), [5, 0, 3]
    heads, size = decoder.shape.num_attention_heads, decoder.shape.head_dim
    q = torch.randn(40, heads, size, generator=torch.Generator().manual_seed(0))
    k, v = q[:, :2] * 0.7, q[:, 2:] * 0.3
    together, one_by_one = (Paged(decoder.shape, 6, 16, dtype=torch.float32) for _ in range(2))
    for kv in (together, one_by_one):
        kv.begin([Part(pages, 0, 29, 29)])
        kv.attend(0, q[:29], k[:29], v[:29])
    together.begin([Part(pages, 29, 7, 29, apart=True), Part([4], 0, 1, 1)])
    mixed = together.attend(0, q[29:37], k[29:37], v[29:37])
    for place in range(29, 36):
        one_by_one.begin([Part(pages, place, 1, 29)])
        row = slice(place, place + 1)
        assert torch.equal(
            one_by_one.attend(0, q[row], k[row], v[row]), mixed[place - 29 : place - 28]
        )
    assert torch.equal(together.keys[:, pages], one_by_one.keys[:, pages])
    together.erase(pages, 31, 36)
    left = together.keys[0, pages].transpose(0, 1).flatten(1, 2)
    assert torch.equal(left[:, :31], k[:31].transpose(0, 1))
    assert not left[:, 31:].any()
    assert together.keys[0, 4].any()


def test_padding_is_never_seen() -> None:
    """Short beside long, in pages where somebody left what is no number."""
    decoder = tiny_decoder()
    kv = Paged(decoder.shape, 8, 4, dtype=torch.float32)
    kv.keys.fill_(float("nan"))
    kv.values.fill_(float("nan"))
    texts, tables = [[5, 6], [*range(20, 30)]], [[7], [1, 3, 0]]
    for step in range(10):
        rows = [row for row in (0, 1) if step < len(texts[row])]
        parts = [Part(tables[row], step, 1, 1) for row in rows]
        ids = torch.tensor([texts[row][step] for row in rows])
        logits = decoder(ids, kv.begin(parts), kv)
        for row, got in zip(rows, logits, strict=True):
            assert torch.allclose(got, whole(decoder, texts[row][: step + 1])[-1], atol=1e-4)


def test_memory_that_is_not_there_is_an_error_in_words() -> None:
    with pytest.raises(XverseError, match="no memory"):
        Paged(tiny_decoder().shape, 2**40, 2**10, dtype=torch.float32)
