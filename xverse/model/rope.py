"""POSITIONS -> ANGLES. Rotary tables: base, linear, dynamic-NTK and Llama 3 scaling."""

import math

import torch
from torch import Tensor

from xverse.model.shape import ModelShape, RopeScaling


class Rope:
    """The rotary embedding of a model: its frequencies, kept for the device it last ran on."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self._inverse: Tensor | None = None

    def tables(
        self, positions_T: Tensor, lengths_T: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """cos and sin of every angle, each [T, E] in `dtype`, computed in fp32.

        `lengths_T`, how many tokens each token's sequence holds by now, is wanted for dynamic
        scaling alone: the base grows with it (NTK-aware scaling, as in Hugging Face's Llama).
        """
        scaling = self.shape.rope_scaling
        if scaling is not None and scaling.rope_type == "dynamic":
            assert lengths_T is not None, "dynamic rope scaling needs the lengths of the sequences"
            inverse = _dynamic(self.shape, scaling, lengths_T)
        else:
            inverse = self._kept(positions_T.device)
        angles = positions_T[:, None].float() * inverse
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _kept(self, device: torch.device) -> Tensor:
        if self._inverse is None or self._inverse.device != device:
            with torch.inference_mode(False):  # training may use them after serving did
                self._inverse = inverse_frequencies(self.shape).to(device)
        return self._inverse


def inverse_frequencies(shape: ModelShape) -> Tensor:
    """Turns per position of each pair of elements, [E/2] fp32; dynamic scaling is not in them."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.int64).float() / shape.head_dim
    inverse = 1.0 / shape.rope_theta**exponents
    scaling = shape.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        inverse = inverse / scaling.factor
    elif scaling is not None and scaling.rope_type == "llama3":
        inverse = _llama3(inverse, scaling)
    return inverse


def _dynamic(shape: ModelShape, scaling: RopeScaling, lengths_T: Tensor) -> Tensor:
    size, trained = shape.head_dim, shape.max_position_embeddings
    lengths = lengths_T[:, None].clamp(min=trained).double()
    stretch = scaling.factor * lengths / trained - (scaling.factor - 1)
    bases = shape.rope_theta * stretch ** (size / (size - 2))
    exponents = torch.arange(0, size, 2, device=lengths_T.device).double() / size
    return (1.0 / bases**exponents).float()


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1: slow pairs are divided by the factor, fast ones kept, a smooth step between."""
    trained = scaling.original_max_position_embeddings
    turns = trained * inverse / (2 * math.pi)  # over the trained context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * inverse + (1 - keep) * inverse / scaling.factor
