"""HOW FAST IS A MIXTURE OF EXPERTS ON A GPU? XVERSE-MoE-A4.2B's shape, random weights, bf16.

First the kernels are checked (`check_moe.py`). Then tokens a second of the fused step
as one CUDA graph (128 tokens in, 256 out, greedy), and a prompt of 2,048 tokens; beside it
transformers' Qwen2Moe of the same sizes, by its loop over experts and as it comes. Floor: the bytes
that a step must read (dense weights, and the experts that its tokens chose) at the copy bandwidth
measured here. `tune_moe.py` sweeps tiles.
"""

import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.check_decode import distance
from bench.check_moe import LONG, SHAPE, check_layer, check_small_model
from bench.decode_gpu import PROMPT, fused_step, greedy, prefilled, random_model, seconds_per_token
from bench.kv_door import copy_bandwidth
from bench.record import record
from xverse.kernels import reference
from xverse.model import feedforward
from xverse.model.cache import Growing, Packed
from xverse.model.decoder import Decoder
from xverse.model.feedforward import MixtureOfExperts

BATCHES = (1, 8, 16)


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
        first = torch.arange(7, 7 + rows, device="cuda") * 997 % SHAPE.vocab_size
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
