"""HOW FAST IS A MIXTURE OF EXPERTS ON A GPU? XVERSE-MoE-A4.2B's shape, random weights, bf16.

First the kernels and a small model are checked against fp32. Then tokens a second of the fused step
as one CUDA graph (128 tokens in, 256 out, greedy), and a prompt of 2,048 tokens; beside it
transformers' Qwen2Moe of the same sizes, by its loop over experts and as it comes. Floor: the bytes
that a step must read (dense weights, and the experts that its tokens chose) at the copy bandwidth
measured here. `python -m bench.tune_moe` sweeps tiles.
"""

import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.check_decode import distance
from bench.decode_gpu import PROMPT, fused_step, greedy, prefilled, random_model, seconds_per_token
from bench.kv_door import copy_bandwidth
from bench.record import record
from tests.tiny_model import published_config
from xverse.engine.step import DecodeStep
from xverse.kernels import dispatch, reference, reference_experts
from xverse.kernels.reference import Norm
from xverse.kernels.reference_experts import Mixture, Plain, Stacks
from xverse.model import feedforward
from xverse.model.cache import Growing, Packed
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder, initialize
from xverse.model.feedforward import MixtureOfExperts
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape

SHAPE = CATALOG["xverse-moe-a4.2b"]
BATCHES, LONG = (1, 8, 16), 2048


def random_mixture(shape: ModelShape, *, std: float) -> Mixture:
    """One layer's experts with the router in fp32, as checkpoints have it."""
    hidden, width, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    shared = width * shape.num_shared_experts

    def normal(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.bfloat16, device="cuda").normal_(0, std)

    return Mixture(
        normal(experts, hidden).float(),
        Stacks(
            normal(experts, width, hidden),
            normal(experts, width, hidden),
            normal(experts, hidden, width),
        ),
        normal(2 * shared, hidden),
        normal(hidden, shared),
        shape.moe_top_k,
    )


def in_fp32(mixture: Mixture) -> Mixture:
    router, stacks, gate_up, down, top_k = mixture
    assert gate_up is not None
    assert down is not None
    wide = Stacks(*(stack.float() for stack in stacks))
    return Mixture(router, wide, gate_up.float(), down.float(), top_k)


@torch.inference_mode()
def check_layer() -> dict[str, float]:
    """A layer at full size: distance of the kernels to fp32, which is what bf16 costs anyway."""
    mixture = random_mixture(SHAPE, std=0.05)  # so that the experts outweigh the residual
    wide = in_fp32(mixture)
    gain = 1 + torch.randn(SHAPE.hidden_size, device="cuda").bfloat16() / 8
    norm = Norm(gain, 1e-6, False)
    apart = {}
    for rows in (1, 2, 5, 8, 16, 17, 100, LONG):
        x = torch.randn(rows, SHAPE.hidden_size, device="cuda").bfloat16()
        # What is chosen hangs on the rounding of the norm, so the exact way takes the rounded one.
        normed = reference.rms_norm(x, gain, 1e-6, weight_in_fp32=False)
        weights, chosen = reference.route(normed, mixture.router_XD, mixture.top_k)
        exact = reference_experts.mix_experts(
            normed.float(), weights.float(), chosen, Plain(wide.stacks)
        )
        exact = x.float() + reference_experts.add_shared(exact, normed.float(), wide)
        plain = distance(reference_experts.mixture_rows(x, mixture, norm), exact)
        fast = dispatch.mixture_rows(x.device, x.dtype, rows, SHAPE.num_experts).call
        first = fast(x, mixture, norm)
        apart[str(rows)] = distance(first, exact)
        assert apart[str(rows)] < 1.3 * plain + 1e-3, (rows, apart, plain)
        assert all(torch.equal(first, fast(x, mixture, norm)) for _ in range(3)), "equal bits again"
    chosen = torch.full_like(chosen[:300], 63)  # all tokens on one expert, the last
    normed, weights = normed[:300], weights[:300]
    many = dispatch.mix_experts(x.device, x.dtype).call(
        normed, weights, chosen, Plain(mixture.stacks)
    )
    exact = reference_experts.mix_experts(
        normed.float(), weights.float(), chosen, Plain(wide.stacks)
    )
    assert distance(many, exact) < 1e-2, distance(many, exact)
    return {rows: round(value, 5) for rows, value in apart.items()}


@torch.inference_mode()
def check_small_model() -> dict[str, list[float]]:
    """Steps of a small model as a graph, and the plain decoder, beside the decoder in fp32."""
    config = published_config(moe=True) | {"hidden_size": 256, "intermediate_size": 192}
    shape = ModelShape.from_config(config)
    found = {}
    for rows in (1, 5, 16):
        decoder = fuse(initialize(Decoder(shape), std=0.05).requires_grad_(False).cuda().bfloat16())
        exact = deepcopy(decoder).float()
        pool = (3 * rows, shape.num_key_value_heads, 16, shape.head_dim)
        keys, values = (
            [torch.zeros(pool, device="cuda").bfloat16() for _ in decoder.model.layers]
            for _ in range(2)
        )
        table = torch.randperm(3 * rows, device="cuda").view(rows, 3).int()
        step = DecodeStep(decoder, keys, values, table)
        replay = step.capture()
        doors = [
            Growing(shape, rows, dtype=d, device="cuda") for d in (torch.bfloat16, torch.float)
        ]
        ours, theirs = [], []
        for place in range(40):
            ids = (torch.arange(rows, device="cuda") * 31 + place * 7) % shape.vocab_size
            step.ids.copy_(ids)
            step.positions.fill_(place)
            fused = replay().clone()
            plain, truth = (
                model(ids, door.extend([1] * rows), door)
                for model, door in zip((decoder, exact), doors, strict=True)
            )
            ours.append(distance(fused, truth))
            theirs.append(distance(plain, truth))
        means = [sum(ours) / len(ours), sum(theirs) / len(theirs)]
        assert means[0] < 1.3 * means[1] + 5e-3, (rows, means)
        found[str(rows)] = [round(mean, 4) for mean in means]
    return found


def bytes_of_a_step(experts: int) -> float:
    """Weights of a step that reads so many routed experts, counted over all layers."""
    layers, hidden = SHAPE.num_hidden_layers, SHAPE.hidden_size
    expert = 3 * hidden * SHAPE.intermediate_size
    every = layers * SHAPE.num_experts
    always = SHAPE.num_parameters - SHAPE.vocab_size * hidden - every * expert
    return 2.0 * (always + experts * expert + every * hidden)  # the last: routers, in fp32


def plain_step(decoder: Decoder, ids: Tensor, door: Growing) -> tuple[Tensor, int]:
    """Logits by the plain decoder, and how many experts were read, counted over all layers."""
    read = []

    def counted(x_TD: Tensor, router_XD: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        weights, chosen = reference.route(x_TD, router_XD, top_k)
        read.append(chosen.unique().numel())
        return weights, chosen

    with mock.patch.object(feedforward, "route", counted):
        logits = decoder(ids, door.extend([1] * len(ids)), door)
    return logits, sum(read)


def median_s(work: Callable[[], object], times: int = 5) -> float:
    work()
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return sorted(found)[times // 2]


@torch.inference_mode()
def ours(bandwidth: float) -> dict[str, object]:
    decoder = random_model(SHAPE)
    for block in decoder.model.layers:
        assert isinstance(block.mlp, MixtureOfExperts)
        block.mlp.router.float()
    figures: dict[str, object] = {}
    for rows in BATCHES:
        door = prefilled(decoder, rows, torch.bfloat16)
        step = fused_step(decoder, door)
        first = torch.arange(rows, device="cuda") * 997 + 7  # other tokens choose other experts
        step.ids.copy_(first)
        step.positions.fill_(PROMPT)
        plain, experts = plain_step(decoder, first, door)
        apart = distance(step(), plain)
        # Of several rows the tokens stay as they are, or all might come to say the same, and choose
        # the same experts; the argmax is computed all the same.
        spare = step.ids if rows == 1 else torch.zeros_like(step.ids)
        replay = step.capture(greedy(spare, step.positions))
        again = []
        for _ in range(2):
            step.ids.copy_(first)
            step.positions.fill_(PROMPT)
            again.append(replay().clone())
        assert torch.isfinite(again[0]).all()
        assert torch.equal(*again), "equal bits again"
        seconds = seconds_per_token(replay, step.positions)
        needed = bytes_of_a_step(experts)
        figures[f"batch {rows}"] = {
            "tokens_per_s": round(rows / seconds, 1),
            "ms_a_step": round(seconds * 1e3, 3),
            "experts_read_a_layer": round(experts / SHAPE.num_hidden_layers, 1),
            "GB_a_step_must_read": round(needed / 1e9, 3),
            "share_of_floor": round(needed / bandwidth / seconds, 3),
            "distance_of_logits_to_the_plain_decoder": round(apart, 4),
        }
        print(rows, figures[f"batch {rows}"], flush=True)
        del step, replay, door
    ids = torch.arange(LONG, device="cuda") * 37 % SHAPE.vocab_size
    last = torch.tensor([LONG - 1], device="cuda")

    def prompt() -> Tensor:
        kv = Packed([LONG], "cuda")
        return decoder(ids, kv.positions(), kv, last)

    figures[f"ms_for_a_prompt_of_{LONG}"] = round(median_s(prompt) * 1e3, 2)
    return figures


def their_config() -> Any:
    """transformers' nearest model: Qwen2Moe, whose shared expert has a gate besides."""
    from transformers import Qwen2MoeConfig

    return Qwen2MoeConfig(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        moe_intermediate_size=SHAPE.intermediate_size,
        shared_expert_intermediate_size=SHAPE.intermediate_size * SHAPE.num_shared_experts,
        num_experts=SHAPE.num_experts,
        num_experts_per_tok=SHAPE.moe_top_k,
        norm_topk_prob=True,
        num_hidden_layers=SHAPE.num_hidden_layers,
        num_attention_heads=SHAPE.num_attention_heads,
        num_key_value_heads=SHAPE.num_key_value_heads,
        max_position_embeddings=SHAPE.max_position_embeddings,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
    )


@torch.inference_mode()
def theirs(device: str = "cuda", answer: int = 48) -> dict[str, object]:
    """transformers' own `generate` and prompt, by its loop over experts and as it comes."""
    from transformers import Qwen2MoeForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2MoeForCausalLM(their_config()).eval()
    torch.set_default_dtype(torch.float32)
    ids = torch.arange(100, 100 + PROMPT, device=device)[None]
    long = (torch.arange(LONG, device=device) * 37 % SHAPE.vocab_size)[None]
    figures: dict[str, object] = {}
    for way in ("as it comes", "eager"):
        if way == "eager":
            model.set_experts_implementation("eager")

        generate = partial(
            model.generate, ids, max_new_tokens=answer, min_new_tokens=answer, do_sample=False
        )
        seconds = median_s(generate, times=1) / answer
        prompt = median_s(partial(model, long, logits_to_keep=1), times=3)
        figures["loop over experts" if way == "eager" else way] = {
            "tokens_per_s_batch_1": round(1 / seconds, 1),
            f"ms_for_a_prompt_of_{LONG}": round(prompt * 1e3, 1),
        }
        print(way, figures, flush=True)
    return figures


def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    start = time.perf_counter()
    figures: dict[str, object] = {
        "model": "XVERSE-MoE-A4.2B shape, random weights, bf16; 128 tokens in, 256 out, greedy",
        "distance_of_a_layer_to_fp32_by_tokens": check_layer(),
        "small_model_distance_to_fp32_fused_and_plain_by_tokens": check_small_model(),
    }
    print(figures, f"{time.perf_counter() - start:.0f} s", flush=True)
    torch.cuda.empty_cache()
    if sys.argv[1:] == ["check"]:
        return
    bandwidth = copy_bandwidth()
    torch.cuda.empty_cache()
    figures["copy_bandwidth_TB_per_s"] = round(bandwidth / 1e12, 3)
    chosen = SHAPE.num_hidden_layers * SHAPE.moe_top_k
    figures["floor_tokens_per_s_batch_1"] = round(bandwidth / bytes_of_a_step(chosen), 1)
    figures["xverse"] = ours(bandwidth)
    print(figures, f"{time.perf_counter() - start:.0f} s", flush=True)
    torch.cuda.empty_cache()
    if find_spec("transformers") is not None:
        figures["transformers Qwen2Moe"] = theirs()
    print(figures, f"{time.perf_counter() - start:.0f} s")
    print(record("moe_h200", figures, ("triton", "transformers")))


if __name__ == "__main__":
    main()
