"""MODEL -> BYTES. What weights and KV memory hold, what a token must read, how fast memory is."""

import resource
import sys
import time
from dataclasses import dataclass

import torch

from xverse.device import free_memory
from xverse.engine.engine import Engine
from xverse.engine.spread import SpreadEngine
from xverse.model.decoder import Decoder


@dataclass(frozen=True)
class Footprint:
    """Bytes of an engine. The peak is of all PyTorch tensors on a GPU, and on a CPU of the whole
    process (resident, files that are mapped included)."""

    weights_bytes: int
    kv_tokens: int
    kv_bytes: int
    peak_bytes: int


def footprint(engine: Engine | SpreadEngine) -> Footprint:
    """What the engine holds now, and the peak up to now; of one that is spread, on one device."""
    return Footprint(
        weight_bytes(engine.decoder),
        engine.capacity,
        engine.kv.nbytes,
        _peak_bytes(engine.decoder.device),
    )


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of all weights, each counted once."""
    return sum(_sizes(decoder).values())


def bytes_per_token(decoder: Decoder) -> int:
    """Weights that one token alone must read: all but the input embedding and idle experts.

    Keys and values are not counted: at short contexts they are one or two hundredths of it.
    """
    shape = decoder.shape
    total = 0.0
    for name, size in _sizes(decoder).items():
        if name == "model.embed_tokens.weight" and decoder.lm_head is not None:
            continue  # one row of it
        routed = ".mlp.experts." in name
        total += size * (shape.moe_top_k / shape.num_experts if routed else 1)
    return int(total)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by the copy of a large tensor: the median of several."""
    largest = 2**31 if device.type == "cuda" else 2**28
    size = max(2**20, min(largest, free_memory(device) // 8))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = 8 if device.type == "cuda" else 1
    times = []
    for _ in range(7):
        _wait(device)
        start = time.perf_counter()
        for _ in range(copies):
            target.copy_(source)
        _wait(device)
        times.append((time.perf_counter() - start) / copies)
    return 2 * size / sorted(times)[3]


def _sizes(decoder: Decoder) -> dict[str, int]:
    tensors = [*decoder.named_parameters(), *decoder.named_buffers()]
    # Wide heads are the memory of the head itself, and a few rows.
    return {name: x.nbytes for name, x in tensors if not name.rpartition(".")[2].startswith("wide")}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB
