"""A sharded decoder computes what the whole one does, whatever kind it is of."""

import copy

import pytest
import torch
from torch import Tensor

from tests.parallel.ranks import ThreadMesh, on_ranks
from tests.tiny_model import published_config, random_decoder
from xverse.engine.step import DecodeStep, unfit
from xverse.errors import XverseError
from xverse.model.cache import Growing
from xverse.model.decoder import Decoder
from xverse.model.fuse import fuse
from xverse.parallel.plan import part_of
from xverse.parallel.tensor import Gathered, Reduced, keep_part, shard
from xverse.quant.quantize import quantize

GQA = {"model_type": "llama", "num_key_value_heads": 2}
BIASED = GQA | {"attention_bias": True, "mlp_bias": True}
KINDS: dict[str, dict[str, object]] = {
    "dense": {},
    "grouped heads": GQA,
    "tied": {"tie_word_embeddings": True},
    "biases": BIASED,
    "odd vocabulary": {"vocab_size": 61},
}


def decoder_of(changes: dict[str, object], *, moe: bool = False) -> Decoder:
    decoder = random_decoder(published_config(moe=moe) | changes, dtype=torch.float32)
    for name, parameter in decoder.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.3)
    return decoder


def logits(decoder: Decoder) -> Tensor:
    """Of a prompt of 9 tokens, and of one more token after it."""
    kv = Growing(decoder.shape, 1, dtype=torch.float32)
    ids = torch.arange(10) * 7 % 60
    first = decoder(ids[:9], kv.extend([9]), kv)
    return torch.cat((first, decoder(ids[9:], kv.extend([1]), kv)))


def same_on_all(whole: Decoder, size: int, *, fused: bool = False) -> None:
    expected = logits(whole)
    copies = [copy.deepcopy(whole) for _ in range(size)]

    def work(mesh: ThreadMesh) -> Tensor:
        part = shard(copies[mesh.rank], mesh)
        return logits(fuse(part) if fused else part)

    found = on_ranks(size, work)
    assert torch.allclose(found[0], expected, atol=1e-5, rtol=1e-4)
    for other in found[1:]:
        assert torch.equal(other, found[0])  # to the bit, or the ranks would part


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_sharded_logits_are_whole_logits(kind: str, size: int) -> None:
    same_on_all(decoder_of(KINDS[kind]), size, fused=size == 2)


@pytest.mark.parametrize("fused", [False, True])
def test_experts(fused: bool) -> None:
    same_on_all(decoder_of({}, moe=True), 2, fused=fused)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("moe", [False, True])
def test_quantized_weights_are_cut_with_their_scales(bits: int, moe: bool) -> None:
    changes = {} if moe else BIASED
    same_on_all(quantize(decoder_of(changes, moe=moe), bits), 2, fused=True)


def test_four_bits_are_not_cut_inside_a_byte() -> None:
    decoder = quantize(decoder_of({"intermediate_size": 42}), 4)
    layer = decoder.model.layers[0].mlp.down_proj
    with pytest.raises(XverseError, match="share a byte"):
        keep_part("model.layers.0.mlp.down_proj", layer, decoder.shape, 0, 2)


def test_a_part_holds_its_own_memory_and_no_more() -> None:
    decoder = decoder_of(BIASED)
    for name, module in decoder.named_modules():
        part = part_of(name, decoder.shape, 1, 2)
        if part is None:
            continue
        kept = keep_part(name, module, decoder.shape, 1, 2)
        weight = kept.weight
        assert weight.untyped_storage().nbytes() == 4 * weight.numel() < module.weight.nbytes
        biased = module.bias is not None and part.side == "outputs"
        assert (kept.bias is not None) == biased  # rank 0 adds those of the sums


def test_only_the_parts_are_left() -> None:
    whole = decoder_of({})
    total = sum(p.numel() for block in whole.model.layers for p in block.parameters())

    def work(mesh: ThreadMesh) -> int:
        decoder = shard(copy.deepcopy(whole), mesh)
        assert isinstance(decoder.lm_head, Gathered)
        assert isinstance(decoder.model.layers[0].self_attn.o_proj, Reduced)
        return sum(p.numel() for block in decoder.model.layers for p in block.parameters())

    norms = 2 * whole.shape.hidden_size * len(whole.model.layers)
    assert sum(on_ranks(2, work)) == total + norms


@pytest.mark.parametrize("changes", [{}, BIASED, {"tie_word_embeddings": True}])
def test_the_fused_decode_step_adds_over_ranks(changes: dict[str, object]) -> None:
    whole = decoder_of(changes)
    ids = [5, 9, 2, 30]
    kv = Growing(whole.shape, 1, dtype=torch.float32)
    expected = [whole(torch.tensor([id]), kv.extend([1]), kv) for id in ids]

    def work(mesh: ThreadMesh) -> list[Tensor]:
        decoder = fuse(shard(copy.deepcopy(whole), mesh))
        assert unfit(decoder) == ""
        pool = (2, decoder.shape.num_key_value_heads, 16, decoder.shape.head_dim)
        keys, values = ([torch.zeros(pool) for _ in decoder.model.layers] for _ in range(2))
        step = DecodeStep(decoder, keys, values, torch.tensor([[1, 0]], dtype=torch.int32))
        found = []
        for place, id in enumerate(ids):
            step.ids.fill_(id)
            step.positions.fill_(place)
            found.append(step().clone())
        return found

    for found in on_ranks(2, work):
        for step, plain in zip(found, expected, strict=True):
            assert torch.allclose(step, plain, atol=1e-4)
