"""WHICH CUT STREAMS BEST? Tiles of the products of one token on this GPU, XVERSE-7B shapes, bf16.

Each candidate runs over enough copies of the weight to overflow the cache, as one CUDA graph, so
that the gaps between launches count. Prints a table; the winners go into
`kernels/tiles.py` by hand. For more tokens: `bench/tune_rows.py`.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xverse.kernels.multiply_rows_triton import multiply_rows
from xverse.kernels.multiply_triton import one_row
from xverse.kernels.reference import Norm
from xverse.kernels.tiles import Tile

BYTES = 2**31  # of weights a graph reads


class Product(NamedTuple):
    """A product of the decoder: outputs, inputs, and what it is fused with."""

    outputs: int
    inputs: int
    norm: bool = False
    gated: bool = False
    residual: bool = False


PRODUCTS = {
    "qkv": Product(12288, 4096, norm=True),
    "o": Product(4096, 4096, residual=True),
    "gate_up": Product(22016, 4096, norm=True, gated=True),
    "down": Product(4096, 11008, residual=True),
    "head": Product(100534, 4096, norm=True),
}
WHOLE = [(4, 1, 4), (2, 1, 4), (8, 1, 8), (4, 1, 8), (8, 1, 4), (4, 2, 4), (2, 1, 2), (2, 2, 4)]
WHOLE += [(4, 4, 4), (1, 1, 2), (1, 1, 4)]
ONE_ROW = [Tile(n, 4096, tiles, warps) for n, tiles, warps in WHOLE]
ONE_ROW += [Tile(8, 2048), Tile(4, 2048), Tile(16, 1024), Tile(8, 1024)]
GATED = [Tile(2, 4096), Tile(1, 4096), Tile(4, 4096, 1, 8), Tile(2, 4096, 1, 8), Tile(4, 4096)]
GATED += [Tile(2, 4096, 2), Tile(1, 4096, 1, 2), Tile(4, 2048), Tile(2, 2048), Tile(8, 2048, 1, 8)]
DOWN = [Tile(4, 2048), Tile(2, 4096), Tile(4, 4096, 1, 8), Tile(8, 1024), Tile(8, 2048, 1, 8)]
DOWN += [Tile(2, 2048), Tile(4, 1024), Tile(2, 4096, 1, 8), Tile(1, 4096), Tile(8, 4096, 1, 16)]
DOWN += [Tile(1, 4096, 1, 2), Tile(2, 2048, 1, 2), Tile(1, 16384), Tile(1, 16384, 1, 8)]
CANDIDATES = {"qkv": ONE_ROW, "o": ONE_ROW, "gate_up": GATED, "down": DOWN, "head": ONE_ROW}


def candidates() -> Iterator[tuple[str, Tile]]:
    for name, tiles in CANDIDATES.items():
        for tile in tiles:
            yield name, tile


def arguments(product: Product, tokens: int) -> dict[str, object]:
    outputs = product.outputs // 2 if product.gated else product.outputs
    weight_D = torch.rand(product.inputs, dtype=torch.bfloat16, device="cuda")
    residual = torch.randn(tokens, outputs, dtype=torch.bfloat16, device="cuda")
    return {
        "norm": Norm(weight_D, 1e-6, True) if product.norm else None,
        "gated": product.gated,
        "residual_TN": residual if product.residual else None,
    }


def compile_one(job: tuple[str, Tile, bool]) -> None:
    """Fill Triton's cache on disk; the process that measures finds it there."""
    name, tile, pdl = job
    product = PRODUCTS[name]
    weight = torch.zeros(product.outputs, product.inputs, dtype=torch.bfloat16, device="cuda")
    x = torch.zeros(1, product.inputs, dtype=torch.bfloat16, device="cuda")
    try:
        one_row(x, weight, tile=tile, pdl=pdl, **arguments(product, 1))  # type: ignore[arg-type]
    except Exception as error:  # a tile may ask for more than the chip has; measuring says so too
        print(name, tile, repr(error)[:100], flush=True)


def compile_all(jobs: list[tuple[str, Tile, bool]]) -> None:
    with multiprocessing.get_context("spawn").Pool(14) as pool:
        pool.map(compile_one, jobs, chunksize=4)


def seconds(work: Callable[[], object], launches: int) -> float:
    """Time of one of `launches` launches, of which `work` is made, captured as a CUDA graph."""
    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    for _ in range(40):  # until the clocks are up
        graph.replay()
    times = []
    for _ in range(15):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2] / launches


def measure(name: str, tokens: int, tile: Tile | None, weights: list[Tensor], pdl: bool) -> float:
    """Bytes of weights a second, in GB; a tile is for one token."""
    product = PRODUCTS[name]
    x = torch.randn(tokens, product.inputs, dtype=torch.bfloat16, device="cuda")
    extra = arguments(product, tokens)

    def work() -> None:
        for weight in weights:
            if tile is None:
                multiply_rows(x, weight, pdl=pdl, **extra)  # type: ignore[arg-type]
            else:
                one_row(x, weight, tile=tile, pdl=pdl, **extra)  # type: ignore[arg-type]

    return weights[0].nbytes / seconds(work, len(weights)) / 1e9


def weights_of(name: str) -> list[Tensor]:
    product = PRODUCTS[name]
    size = (product.outputs, product.inputs)
    copies = max(3, BYTES // (2 * product.outputs * product.inputs))
    return [torch.randn(size, device="cuda").bfloat16() for _ in range(copies)]


def tune() -> dict[str, Tile]:
    """Prints GB/s of every candidate, with and without dependent launch; the best of each."""
    winners = {}
    for name, tiles in CANDIDATES.items():
        weights = weights_of(name)
        found: list[tuple[float, Tile]] = []
        for tile in tiles:
            try:
                speeds = [measure(name, 1, tile, weights, pdl) for pdl in (True, False)]
            except Exception as error:
                print(f"{name:8} {tuple(tile)} {repr(error)[:90]}")
                continue
            found.append((speeds[0], tile))
            shown = " ".join(f"{speed:6.0f}" for speed in speeds)
            print(f"{name:8} {tuple(tile)!s:24} {shown} GB/s", flush=True)
        winners[name] = max(found)[1]
        print(f"{name:8} best {max(found)}", flush=True)
    return winners


def main() -> None:
    compile_all([(name, tile, pdl) for name, tile in candidates() for pdl in (True, False)])
    print(tune())


if __name__ == "__main__":
    main()
