"""HOW FAST DOES A GPU DECODE? XVERSE's shapes, random weights, bf16: 128 tokens in, 256 out.

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
from xverse.model.shape import ModelShape

PROMPT, ANSWER, PAGE = 128, 256, 64
BATCHES = {"xverse-7b": (1, 8), "xverse-13b-2": (1,)}


def random_model(shape: ModelShape) -> Decoder:
    with torch.device("meta"):
        decoder = Decoder(shape).to(torch.bfloat16)
    return fuse(initialize(decoder.to_empty(device="cuda")).requires_grad_(False).eval())


def prefilled(decoder: Decoder, rows: int, dtype: torch.dtype) -> Growing:
    """A door that holds another prompt of 128 tokens for each row."""
    shape = decoder.shape
    door = Growing(shape, rows, dtype=dtype, device="cuda")
    prompt = torch.arange(100, 100 + PROMPT * rows, device="cuda") % shape.vocab_size
    counts = [PROMPT] * rows
    decoder(prompt, door.extend(counts), door, torch.tensor([0], device="cuda"))
    return door


def fused_step(decoder: Decoder, door: Growing) -> DecodeStep:
    """The step, its pages holding in mixed order what the door holds."""
    rows, pages = len(door.held), (PROMPT + ANSWER) // PAGE
    shape = decoder.shape
    pool = (rows * pages, shape.num_key_value_heads, PAGE, shape.head_dim)
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


def static_door(shape: ModelShape, door: Growing) -> Static:
    static = Static(shape, len(door.held), "cuda")
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


def run(decoder: Decoder, rows: int, exact: Tensor) -> tuple[dict[str, float], dict[str, object]]:
    """Logits checked, then tokens a second of both ways, `rows` sequences at a time."""
    door = prefilled(decoder, rows, torch.bfloat16)
    step, static = fused_step(decoder, door), static_door(decoder.shape, door)
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
    speeds = {
        "fused step": rows / fused_s,
        "fused step, no sampling, 128 held": rows / without_sampling_s,
        "plain decoder, compiled": rows / plain_s,
    }
    distances = {way: round(value, 5) for way, value in apart.items()}
    return speeds, {"distance_of_logits_to_fp32": distances}


def model(name: str, bandwidth: float) -> dict[str, object]:
    """Every batch size of one model, with its floor: its weights read once at `bandwidth`."""
    shape = CATALOG[name]
    wide, exact = random_model(shape).float(), {}
    for rows in BATCHES[name]:
        door = prefilled(wide, rows, torch.float32)
        exact[rows] = wide(torch.full((rows,), 7, device="cuda"), door.extend([1] * rows), door)
    del wide, door
    torch.cuda.empty_cache()
    decoder = random_model(shape)
    weights = 2 * (shape.num_parameters - shape.vocab_size * shape.hidden_size)
    figures: dict[str, object] = {"floor_tokens_per_s_batch_1": round(bandwidth / weights, 1)}
    for rows in BATCHES[name]:
        speeds, facts = run(decoder, rows, exact[rows])
        figures[f"batch {rows}"] = facts | {
            "tokens_per_s": {way: round(speed, 1) for way, speed in speeds.items()},
            "steps_by_the_floor": {
                way: round(speed / rows * weights / bandwidth, 3) for way, speed in speeds.items()
            },
        }
    return figures


def transformers_tokens_per_s() -> float:
    """transformers' own `generate`, as it comes, on a Llama of 7B's shape, batch 1."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
    config = LlamaConfig.from_dict(
        {**CATALOG["xverse-7b"].to_config(), **fields, "model_type": "llama"}
    )
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
    figures: dict[str, object] = {
        "models": "XVERSE shapes, random weights, bf16; 128 tokens in, 256 out, greedy",
        "copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 3),
        "weights_GB_per_s_of_7b_products_by_tokens": products,
    }
    for name in sys.argv[1:] or BATCHES:
        figures[name] = model(name, bandwidth)
        print(name, figures[name], flush=True)
        torch.cuda.empty_cache()
    if find_spec("transformers") is not None:
        figures["transformers_generate_tokens_per_s_batch_1"] = round(
            transformers_tokens_per_s(), 1
        )
    print(figures)
    print(record("decode_h200", figures, ("triton", "transformers")))


if __name__ == "__main__":
    main()
