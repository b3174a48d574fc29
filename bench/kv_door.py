"""DOES THE KV DOOR COST ANYTHING? One decode step of XVERSE-7B's shape, on a GPU, three ways.

Eager, captured as a CUDA graph, and compiled and captured; random weights, batch 1, bf16. First the
three are checked against each other and against the reference door. Floor: the bytes of the weights
at the copy bandwidth measured in the same run.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.record import record
from xverse.kernels.attend import attend_batch
from xverse.model.cache import Growing
from xverse.model.catalog import CATALOG
from xverse.model.decoder import Decoder, initialize
from xverse.model.fuse import fuse
from xverse.model.shape import ModelShape

CAPACITY = 512
STEPS = 200


class Static:
    """A door whose memory and lengths stay in place, as a captured step needs them."""

    def __init__(self, shape: ModelShape, sequences: int, device: str) -> None:
        size = (sequences, shape.num_key_value_heads, CAPACITY, shape.head_dim)
        layers = range(shape.num_hidden_layers)
        self.keys = [torch.zeros(size, dtype=torch.bfloat16, device=device) for _ in layers]
        self.values = [torch.zeros(size, dtype=torch.bfloat16, device=device) for _ in layers]
        self.positions = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.rows = torch.arange(sequences, device=device)
        self.places = torch.arange(CAPACITY, device=device)

    def lengths(self) -> Tensor:
        return self.positions + 1

    def attend(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        self.keys[layer][self.rows, :, self.positions] = k_TKE
        self.values[layer][self.rows, :, self.positions] = v_TKE
        mask = self.places <= self.positions[:, None]
        return attend_batch(q_THE, self.keys[layer], self.values[layer], mask)


def seconds_per_step(step: Callable[[], object]) -> float:
    for _ in range(10):
        step()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / STEPS


def captured(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The step as a CUDA graph, and the tensor that each replay fills."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph.replay, out


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 4 GiB."""
    source = torch.empty(2**32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**32 / seconds_per_step(lambda: target.copy_(source))


@torch.inference_mode()
def main() -> None:
    shape = CATALOG["xverse-7b"]
    with torch.device("meta"):
        decoder = Decoder(shape).to(torch.bfloat16)
    decoder = fuse(initialize(decoder.to_empty(device="cuda")).requires_grad_(False).eval())
    prompt = torch.arange(100, 228, device="cuda")
    ids = torch.tensor([7], device="cuda")
    reference = Growing(shape, 1, dtype=torch.bfloat16, device="cuda")
    decoder(prompt, reference.extend([128]), reference, torch.tensor([127], device="cuda"))
    door = Static(shape, 1, "cuda")
    for layer in range(shape.num_hidden_layers):
        door.keys[layer][:, :, :128] = reference.keys[layer][:, :, :128]
        door.values[layer][:, :, :128] = reference.values[layer][:, :, :128]
    door.positions.fill_(128)
    expected = decoder(ids, reference.extend([1]), reference)

    def step() -> Tensor:
        return decoder(ids, door.positions, door)

    compiled_decoder = torch.compile(decoder, fullgraph=True)

    def compiled() -> Tensor:
        return compiled_decoder(ids, door.positions, door)

    replay: Callable[[], object]
    times: dict[str, float] = {}
    differences: dict[str, float] = {}
    for name, one in (("eager", step), ("graph", step), ("compiled graph", compiled)):
        if "graph" in name:
            replay, out = captured(one)
            replay()
        else:
            replay, out = one, one()
        differences[name] = float((out.float() - expected.float()).abs().max())
        times[name] = seconds_per_step(replay)
    bandwidth = copy_bandwidth()
    weights = 2 * (shape.num_parameters - shape.vocab_size * shape.hidden_size)
    floor = weights / bandwidth
    figures: dict[str, object] = {
        "model": "XVERSE-7B shape, random weights, bf16, batch 1, 129 tokens held",
        "logits_std": float(expected.float().std()),
        "largest_difference_to_reference_door": differences,
        "tokens_per_s": {name: round(1 / value, 1) for name, value in times.items()},
        "copy_bandwidth_TB_per_s": round(bandwidth / 1e12, 2),
        "floor_tokens_per_s": round(1 / floor, 1),
        "share_of_floor": {name: round(floor / value, 3) for name, value in times.items()},
    }
    print(figures)
    print(record("kv_door_h200", figures, ()))


if __name__ == "__main__":
    main()
