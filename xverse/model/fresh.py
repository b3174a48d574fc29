"""SHAPE -> DECODER. Random weights of any shape, made where they will run; to measure with."""

import torch

from xverse.device import free_memory
from xverse.errors import XverseError
from xverse.model.decoder import Decoder, initialize
from xverse.model.feedforward import MixtureOfExperts
from xverse.model.shape import ModelShape

SHARE = 0.92  # of the free memory: the rest is for one step's activations and little KV


def random_decoder(
    shape: ModelShape, *, dtype: torch.dtype, device: torch.device, std: float = 0.02, seed: int = 0
) -> Decoder:
    """A decoder of `shape`, ready to run: normal weights, in `dtype` (a router's in fp32).

    XverseError where `device` has not the memory for them.
    """
    _refuse_what_does_not_fit(shape, dtype, device)
    with torch.device("meta"):
        decoder = Decoder(shape).to(dtype)
    decoder = decoder.to_empty(device=device)
    for block in decoder.model.layers:
        if isinstance(block.mlp, MixtureOfExperts):
            block.mlp.router.float()
    return initialize(decoder, std=std, seed=seed).eval().requires_grad_(False)


def _refuse_what_does_not_fit(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> None:
    needed, free = shape.num_parameters * dtype.itemsize, free_memory(device)
    if needed > SHARE * free:
        raise XverseError(
            f"The weights of this shape do not fit on {device}.",
            f"{shape.num_parameters / 1e9:.1f} B parameters in {str(dtype).removeprefix('torch.')} "
            f"are {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free.",
            "Take a smaller shape, a smaller dtype or a larger device.",
        )
