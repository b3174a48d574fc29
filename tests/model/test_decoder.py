"""The decoder against transformers' Llama, an independent mixture of experts, and itself."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from xverse.model.cache import Growing, Packed
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape

transformers = pytest.importorskip("transformers")

BASE: dict[str, object] = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
FAMILIES = {
    "mha": BASE,
    "gqa": BASE | {"num_key_value_heads": 2},
    "gqa-tied": BASE | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "biases": BASE | {"attention_bias": True, "mlp_bias": True},
    "wide-heads": BASE | {"head_dim": 32},
    "rope-base": BASE | {"rope_theta": 500000.0},
    "linear": BASE | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "dynamic": BASE | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "llama3": BASE
    | {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}
MOE = BASE | {
    "model_type": "xverse",
    "num_experts": 8,
    "moe_top_k": 3,
    "num_shared_experts": 2,
    "rope_theta": 500000.0,
}


def pair(config: dict[str, object], dtype: torch.dtype) -> tuple[Decoder, torch.nn.Module]:
    """Our decoder and transformers' Llama with the same random weights."""
    shape = ModelShape.from_config(config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).to(dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.08, generator=generator)
    ours = Decoder(shape).to(dtype)
    state = theirs.state_dict()
    if shape.tie_word_embeddings:
        del state["lm_head.weight"]
    ours.load_state_dict(state)
    return ours.requires_grad_(False), theirs.requires_grad_(False)


def random_ids(count: int, vocab: int = 300, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed))


def full(decoder: Decoder, ids: Tensor) -> Tensor:
    kv = Packed([len(ids)])
    return decoder(ids, kv.positions(), kv)


def stepwise(decoder: Decoder, ids: Tensor, prompt: int, dtype: torch.dtype) -> Tensor:
    kv = Growing(decoder.shape, 1, dtype=dtype)
    parts = [decoder(ids[:prompt], kv.extend([prompt]), kv)]
    parts += [decoder(ids[i : i + 1], kv.extend([1]), kv) for i in range(prompt, len(ids))]
    return torch.cat(parts)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True])
def test_logits_equal_transformers_llama(family: str, fused: bool) -> None:
    ours, theirs = pair(FAMILIES[family], torch.float32)
    if fused:
        fuse(ours)
    ids = random_ids(40)
    expected = theirs(ids[None]).logits[0]
    assert (full(ours, ids) - expected).abs().max() < 1e-5
    assert (stepwise(ours, ids, 24, torch.float32) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["mha", "gqa"])
def test_bf16_logits_are_as_close_as_bf16_allows(family: str) -> None:
    ours, theirs = pair(FAMILIES[family], torch.bfloat16)
    exact, _ = pair(FAMILIES[family], torch.float32)
    exact.load_state_dict({name: w.float() for name, w in ours.state_dict().items()})
    ids = random_ids(40)
    expected = theirs(ids[None]).logits[0].float()
    error = (expected - full(exact, ids)).abs()  # what bf16 costs transformers itself
    for got in (full(ours, ids), stepwise(ours, ids, 24, torch.bfloat16)):
        ours_error = (got.float() - full(exact, ids)).abs()
        assert ours_error.mean() < 1.25 * error.mean()
        assert ours_error.max() < 2 * error.max()


def test_dynamic_rope_follows_transformers_past_the_trained_length() -> None:
    ours, theirs = pair(FAMILIES["dynamic"], torch.float32)
    ids = random_ids(100)  # 64 were trained
    expected = theirs(ids[None]).logits[0]
    assert (full(ours, ids) - expected).abs().max() < 1e-5


def naive_moe_block(block: torch.nn.Module, x: Tensor, top_k: int) -> Tensor:
    """The mixture of experts token by token and expert by expert, from its description alone."""
    moe = block.mlp
    out = []
    for row in x:
        probabilities = functional.softmax(moe.router.weight.float() @ row.float(), dim=0)
        best = sorted(range(len(probabilities)), key=lambda e: -float(probabilities[e]))[:top_k]
        total = sum(float(probabilities[e]) for e in best) + 1e-6
        mixed = torch.zeros_like(row)
        for e in best:
            gate = moe.experts.gate_proj.weight[e] @ row
            up = moe.experts.up_proj.weight[e] @ row
            inner = gate / (1 + torch.exp(-gate)) * up
            mixed += float(probabilities[e]) / total * (moe.experts.down_proj.weight[e] @ inner)
        gate = moe.shared_experts.gate_proj.weight @ row
        inner = gate / (1 + torch.exp(-gate)) * (moe.shared_experts.up_proj.weight @ row)
        out.append(mixed + moe.shared_experts.down_proj.weight @ inner)
    return torch.stack(out)


def test_moe_block_equals_the_naive_one() -> None:
    decoder = initialize(Decoder(ModelShape.from_config(MOE)), std=0.1).requires_grad_(False)
    x = torch.randn(17, 64, generator=torch.Generator().manual_seed(2))
    for block in decoder.model.layers:
        expected = naive_moe_block(block, x, 3)
        assert torch.allclose(block.mlp(x), expected, atol=1e-5, rtol=1e-4)


def test_moe_decodes_stepwise_as_it_reads() -> None:
    decoder = initialize(Decoder(ModelShape.from_config(MOE)), std=0.1).requires_grad_(False)
    ids = random_ids(20)
    assert torch.allclose(
        stepwise(decoder, ids, 7, torch.float32), full(decoder, ids), atol=1e-4, rtol=1e-4
    )


def test_slabs_grow_without_losing_anything() -> None:
    config = BASE | {"num_hidden_layers": 2, "max_position_embeddings": 512}
    decoder = initialize(Decoder(ModelShape.from_config(config)), std=0.1).requires_grad_(False)
    ids = random_ids(300)
    kv = Growing(decoder.shape, 1, dtype=torch.float32)
    decoder(ids[:10], kv.extend([10]), kv)
    first = kv.capacity
    got = [decoder(ids[i : i + 1], kv.extend([1]), kv) for i in range(10, 300)]
    assert kv.capacity > first
    assert torch.allclose(torch.cat(got), full(decoder, ids)[10:], atol=1e-4)


def test_packed_documents_do_not_see_each_other() -> None:
    decoder = initialize(Decoder(ModelShape.from_config(BASE)), std=0.1).requires_grad_(False)
    ids = random_ids(30)
    kv = Packed([11, 1, 18])
    together = decoder(ids, kv.positions(), kv)
    alone = torch.cat([full(decoder, part) for part in ids.split([11, 1, 18])])
    assert torch.allclose(together, alone, atol=1e-5)


def test_sequences_of_different_length_grow_side_by_side() -> None:
    """Ragged prompts, ragged chunks, resting sequences: every logit as if alone."""
    for config in (FAMILIES["gqa"], FAMILIES["dynamic"]):
        decoder = initialize(Decoder(ModelShape.from_config(config)), std=0.1)
        decoder.requires_grad_(False)
        texts = [random_ids(n, seed=n) for n in (30, 12, 21)]
        plan = [[5, 1, 9], [1, 1, 1], [0, 1, 1], [7, 0, 2], [1, 0, 0], [1, 1, 1], [2, 3, 0]]
        kv = Growing(decoder.shape, 3, dtype=torch.float32)
        seen = [0, 0, 0]
        for counts in plan:
            chunk = [t[s : s + n] for t, s, n in zip(texts, seen, counts, strict=True)]
            logits = decoder(torch.cat(chunk), kv.extend(counts), kv).split(counts)
            seen = [s + n for s, n in zip(seen, counts, strict=True)]
            for text, done, count, got in zip(texts, seen, counts, logits, strict=True):
                if count:
                    expected = full(decoder, text[:done])[-count:]
                    assert torch.allclose(got, expected, atol=1e-4), (counts, done)


def test_rows_choose_which_logits_are_computed() -> None:
    decoder = initialize(Decoder(ModelShape.from_config(BASE)))
    ids, kv = random_ids(9), Packed([9])
    rows = torch.tensor([8, 2])
    chosen = decoder(ids, kv.positions(), kv, rows)
    assert torch.allclose(chosen, full(decoder, ids)[rows], atol=1e-6)


def test_rows_that_are_read_are_those_of_all() -> None:
    torch.manual_seed(0)
    decoder = initialize(Decoder(ModelShape.from_config(FAMILIES["gqa"])), std=0.2)
    ids = torch.randint(300, (30,))
    packed = Packed([12, 18])
    everything = decoder.hidden(ids, packed.positions(), packed)
    rows = torch.tensor([11, 28, 29])
    seen = []
    last = decoder.model.layers[-1].mlp
    assert isinstance(last, torch.nn.Module)
    last.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    for some in (rows, rows[:0]):
        found = decoder.hidden(ids, packed.positions(), packed, some)
        assert found.shape == (len(some), 64)
        torch.testing.assert_close(found, everything[some], atol=1e-5, rtol=1e-5)
    assert seen == [3, 0]  # nothing is computed for the others
