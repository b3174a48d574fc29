"""HOW FAST DOES A GPU DECODE? XVERSE-7B's shape, random weights, bf16: 128 tokens in, 256 out.

The fused step (`engine/step.py`) beside the plain decoder, compiled, each as one CUDA graph with
greedy sampling in it. Kernels and logits are checked first, in the same run. Floor: the bytes of
the weights at the copy bandwidth measured here.
"""

import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from bench import check_decode
from bench.check_decode import distance
from bench.kv_door import Static, captured, copy_bandwidth
from bench.record import record
from bench.tune_decode import PRODUCTS, measure, weights_of
from xverse.engine.step import DecodeStep
from xverse.model.cache import Growing
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse

PROMPT, ANSWER, PAGE = 128, 256, 64
SHAPE = CATALOG["xverse-7b"]


def random_model() -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(SHAPE).to(torch.bfloat16)
    return fuse(initialize(decoder.to_empty(device="cuda")).requires_grad_(False).eval())


def prefilled(decoder: Decoder, rows: int, dtype: torch.dtype) -> Growing:
    """A door that holds another prompt of 128 tokens for each row."""
    door = Growing(SHAPE, rows, dtype=dtype, device="cuda")
    prompt = torch.arange(100, 100 + PROMPT * rows, device="cuda") % SHAPE.vocab_size
    counts = [PROMPT] * rows
    decoder(prompt, door.extend(counts), door, torch.tensor([0], device="cuda"))
    return door


def fused_step(decoder: Decoder, door: Growing) -> DecodeStep:
    """The step, its pages holding in mixed order what the door holds."""
    rows, pages = len(door.held), (PROMPT + ANSWER) // PAGE
    pool = (rows * pages, SHAPE.num_key_value_heads, PAGE, SHAPE.head_dim)
    table = torch.randperm(rows * pages, device="cuda").view(rows, pages)
    sides: list[list[Tensor]] = []
    for slabs in (door.keys, door.values):
        side = []
        for slab in slabs:
            pages_held = torch.zeros(pool, dtype=torch.bfloat16, device="cuda")
            held = slab[:, :, :PROMPT].unflatten(2, (-1, PAGE)).transpose(1, 2)
            pages_held[table[:, : PROMPT // PAGE]] = held
            side.append(pages_held)
        sides.append(side)
    return DecodeStep(decoder, sides[0], sides[1], table.int())


def static_door(door: Growing) -> Static:
    static = Static(SHAPE, len(door.held), "cuda")
    for slabs, held in ((static.keys, door.keys), (static.values, door.values)):
        for slab, past in zip(slabs, held, strict=True):
            slab[:, :, :PROMPT] = past[:, :, :PROMPT]
    return static


def seconds_per_token(step: Callable[[], object], positions: Tensor) -> float:
    """Median of five answers of 256 tokens, from position 128."""
    times = []
    for _ in range(5):
        positions.fill_(PROMPT)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(ANSWER):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / ANSWER)
    return sorted(times)[2]


def greedy(ids: Tensor, positions: Tensor) -> Callable[[Tensor], None]:
    def then(logits: Tensor) -> None:
        ids.copy_(logits.argmax(-1))
        positions.add_(1)

    return then


def run(decoder: Decoder, rows: int, exact: Tensor) -> dict[str, object]:
    """Logits checked, then tokens a second of both ways, `rows` sequences at a time."""
    door = prefilled(decoder, rows, torch.bfloat16)
    step, static = fused_step(decoder, door), static_door(door)
    first = torch.full((rows,), 7, device="cuda")
    plain = decoder(first, door.extend([1] * rows), door)
    step.ids.copy_(first)
    step.positions.fill_(PROMPT)
    fused = step()
    apart = {"plain": distance(plain, exact), "fused": distance(fused, exact)}
    assert apart["fused"] < 1.3 * apart["plain"] + 1e-3, apart

    bare = step.capture()
    without_sampling_s = seconds_per_token(bare, step.positions)
    replay = step.capture(greedy(step.ids, step.positions))
    step.ids.copy_(first)
    step.positions.fill_(PROMPT)
    captured_logits = replay()
    assert distance(captured_logits, fused) == 0.0, "the graph gives the bits of the step"
    fused_s = seconds_per_token(replay, step.positions)

    ids, then = first.clone(), greedy(first, static.positions)
    torch._dynamo.reset()  # or the second batch size would be compiled for any batch size
    compiled = torch.compile(decoder, fullgraph=True, dynamic=False)
    static.positions.fill_(PROMPT)

    def both() -> Tensor:
        logits = compiled(ids, static.positions, static)
        then(logits)
        return logits

    plain_replay, _ = captured(both)
    plain_s = seconds_per_token(plain_replay, static.positions)
    return {
        "distance_of_logits_to_fp32": {name: round(value, 5) for name, value in apart.items()},
        "tokens_per_s": {
            "fused step": round(rows / fused_s, 1),
            "fused step, no sampling, 128 held": round(rows / without_sampling_s, 1),
            "plain decoder, compiled": round(rows / plain_s, 1),
        },
        "ms_per_step": {"fused step": round(1e3 * fused_s, 3), "plain": round(1e3 * plain_s, 3)},
    }


def transformers_tokens_per_s() -> float:
    """transformers' own `generate`, as it comes, on a Llama of the same shape, batch 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    config = LlamaConfig.from_dict({**SHAPE.to_config(), **fields, "model_type": "llama"})
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    prompt = torch.arange(100, 100 + PROMPT, device="cuda")[None]
    times = []
    for tokens in (8, ANSWER, ANSWER):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / tokens)
    return 1 / min(times[1:])


@torch.inference_mode()
def main() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    check_decode.main()
    bandwidth = copy_bandwidth()
    products = {
        str(tokens): {
            name: round(measure(name, tokens, None, weights_of(name), pdl=True))
            for name in PRODUCTS
        }
        for tokens in (1, 8)
    }
    batches = [int(argument) for argument in sys.argv[1:]] or [1, 8]
    decoder = random_model()
    exact = {}
    wide = random_model().float()
    for rows in batches:
        door = prefilled(wide, rows, torch.float32)
        exact[rows] = wide(torch.full((rows,), 7, device="cuda"), door.extend([1] * rows), door)
    del wide, door
    torch.cuda.empty_cache()
    weights = 2 * (SHAPE.num_parameters - SHAPE.vocab_size * SHAPE.hidden_size)
    floor = weights / bandwidth
    results = {rows: run(decoder, rows, exact[rows]) for rows in batches}
    del decoder
    torch.cuda.empty_cache()
    figures: dict[str, object] = {
        "model": "XVERSE-7B shape, random weights, bf16; 128 tokens in, 256 out, greedy",
        "copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 3),
        "floor_tokens_per_s_batch_1": round(1 / floor, 1),
        "weights_GB_per_s_of_products": products,
        "batch": results,
    }
    one = results.get(1)
    if one is not None:
        speeds = one["tokens_per_s"]
        assert isinstance(speeds, dict)
        figures["share_of_floor_batch_1"] = {
            name: round(speed * floor, 3) for name, speed in speeds.items()
        }
    if find_spec("transformers") is not None:
        figures["transformers_generate_tokens_per_s_batch_1"] = round(
            transformers_tokens_per_s(), 1
        )
    print(figures)
    print(record("decode_h200", figures, ("triton", "transformers")))


if __name__ == "__main__":
    main()
