"""Adapters of the tiny model: random ones of ours, and those that PEFT makes and reads."""

from pathlib import Path

import torch

from xverse.checkpoint.adapter import Adapter, LowRank, linear_sizes
from xverse.model.decoder import Decoder
from xverse.model.shape import ModelShape

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SEVEN = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def random_adapter(
    shape: ModelShape,
    *,
    seed: int,
    rank: int = 4,
    targets: tuple[str, ...] = SEVEN,
    dora: bool = False,
    size: float = 0.3,
    chat_format: str | None = None,
) -> Adapter:
    """An adapter with numbers large enough that answers change."""
    drawn = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (outputs, inputs) in linear_sizes(shape).items():
        if name.rpartition(".")[2] not in targets:
            continue
        weights[name] = LowRank(
            torch.randn(rank, inputs, generator=drawn) * size,
            torch.randn(outputs, rank, generator=drawn) * size,
            alpha=2.0 * rank,
            magnitude_N=torch.rand(outputs, generator=drawn) + 0.5 if dora else None,
        )
    return Adapter(weights, targets=targets, chat_format=chat_format)


@torch.no_grad()
def merge(decoder: Decoder, adapter: Adapter) -> Decoder:
    """The decoder with the adapter in its weights, in place; written apart from the engine's."""
    for name, change in adapter.weights.items():
        above, _, projection = name.rpartition(".")
        if ".experts." in name:
            stack, _, number = above.rpartition(".")
            weight_ND = decoder.get_submodule(f"{stack}.{projection}").weight[int(number)]
        else:
            weight_ND = decoder.get_submodule(name).weight
        merged_ND = weight_ND + adapter.scale(name) * (change.b_NR @ change.a_RD)
        if change.magnitude_N is not None:
            lengths_N = torch.linalg.vector_norm(merged_ND, dim=1)
            merged_ND = merged_ND * (change.magnitude_N / lengths_N)[:, None]
        weight_ND.copy_(merged_ND)
    return decoder


def folder_files(folder: Path) -> set[str]:
    """Names of the files in a folder."""
    return {path.name for path in folder.iterdir()}
