"""WHICH CUT OF THE EXPERTS IS BEST? Tiles on this GPU, XVERSE-MoE-A4.2B's shape, bf16.

A candidate takes the place of one of the two products and the rest stays as chosen; what is timed
is the second half of a block over several layers, as one CUDA graph. The winners go into
`choose_tiles` and `choose_cut` by hand.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.check_moe import SHAPE, random_mixture
from bench.tune_decode import seconds
from xverse.kernels import experts_triton, grouped_triton, reference
from xverse.kernels.experts_triton import Tiles, choose_tiles
from xverse.kernels.grouped_triton import choose_cut
from xverse.kernels.multiply import ROWS
from xverse.kernels.parts_triton import ExpertTile
from xverse.kernels.reference import Norm
from xverse.kernels.reference_experts import Mixture, Plain
from xverse.kernels.route_triton import Scratch

LAYERS = 6
GATE_UP = [
    (4, 512, 2),
    (8, 512, 4),
    (4, 512, 4),
    (2, 512, 2),
    (8, 512, 2),
    (2, 512, 1),
    (4, 512, 1),
]
GATE_UP += [(4, 1024, 4), (2, 1024, 4), (2, 4096, 8), (1, 4096, 4), (4, 256, 1), (8, 256, 1)]
DOWN = [(2, 2048, 4), (4, 2048, 4), (4, 2048, 8), (1, 2048, 4), (1, 2048, 2), (2, 2048, 8)]
DOWN += [(4, 1024, 4), (2, 1024, 4), (4, 256, 1), (2, 256, 1), (8, 256, 1), (4, 512, 2)]
SOME = [(64, 128, 4, 3), (64, 128, 4, 2), (64, 128, 4, 4), (64, 64, 4, 4), (64, 64, 4, 6)]
SOME += [(64, 256, 4, 2), (128, 64, 4, 4), (128, 128, 8, 2), (64, 256, 8, 3), (128, 64, 8, 4)]
MANY = [(128, 64, 8, 3), (128, 64, 8, 4), (64, 64, 4, 4), (128, 64, 4, 3), (256, 64, 8, 3)]
MANY += [(64, 128, 4, 3), (128, 128, 8, 2), (64, 64, 8, 4)]


def timed(name: str, tile: ExpertTile, work: Callable[[], object]) -> None:
    try:
        print(f"{name:16} {tuple(tile)!s:20} {seconds(work, LAYERS) * 1e6:8.1f} us", flush=True)
    except Exception as error:  # a tile may ask for more than the chip has
        print(f"{name:16} {tuple(tile)!s:20} {repr(error)[:80]}", flush=True)


def many(layers: list[Mixture], x: Tensor, cut: grouped_triton.Cut) -> None:
    for layer in layers:
        chosen = reference.route(x, layer.router_XD, layer.top_k)
        grouped_triton.mix_experts(x, *chosen, Plain(layer.stacks), cut=cut)


def few(layers: list[Mixture], x: Tensor, norm: Norm, scratch: Scratch, tiles: Tiles) -> None:
    for layer in layers:
        experts_triton.mixture_rows(x, layer, norm, scratch=scratch, pdl=True, tiles=tiles)


def tune_many(layers: list[Mixture], x: Tensor) -> None:
    chosen_cut = choose_cut(len(x) * SHAPE.moe_top_k, SHAPE.num_experts)
    for choices in dict.fromkeys((chosen_cut.choices, 64, 128)):
        base = chosen_cut._replace(choices=choices)
        for tile in (ExpertTile(*one) for one in MANY):
            cut = base._replace(gate_up=tile)
            timed(f"{len(x)} {choices} gate_up", tile, partial(many, layers, x, cut))
            cut = base._replace(down=tile)
            timed(f"{len(x)} {choices} down", tile, partial(many, layers, x, cut))


def tune_few(layers: list[Mixture], x: Tensor) -> None:
    rows, hidden = x.shape
    norm = Norm(torch.ones_like(x[0]), 1e-6, False)
    scratch = Scratch.reserve(rows, SHAPE.num_experts, "cuda")
    base = choose_tiles(rows, hidden, SHAPE.intermediate_size)
    for tile in (ExpertTile(*one) for one in (GATE_UP if rows == 1 else SOME)):
        tiles = base._replace(gate_up=tile)
        timed(f"{rows} gate_up", tile, partial(few, layers, x, norm, scratch, tiles))
    for tile in (ExpertTile(*one) for one in (DOWN if rows == 1 else SOME)):
        tiles = base._replace(down=tile)
        timed(f"{rows} down", tile, partial(few, layers, x, norm, scratch, tiles))


@torch.inference_mode()
def main() -> None:
    layers = [random_mixture(SHAPE, std=0.02) for _ in range(LAYERS)]
    for rows in [int(argument) for argument in sys.argv[1:]] or [1, 8, 2048]:
        x = torch.randn(rows, SHAPE.hidden_size, device="cuda").bfloat16()
        (tune_few if rows <= ROWS else tune_many)(layers, x)


if __name__ == "__main__":
    main()
