"""WHAT SMALLER MEANS. A quantization scheme, and how config.json says it."""

from collections.abc import Mapping
from dataclasses import dataclass

from xverse.errors import XverseError


@dataclass(frozen=True)
class Scheme:
    """Symmetric integers with one scale per output row: the scheme of `model.quantize(8 | 4)`.

    q = round(w / scale), scale = max|row| / (2^(bits-1) - 1); the weights of the linear layers in
    the blocks alone, computed in 16 or 32 bit. Embedding, head, norms and router stay as they are.
    """

    bits: int

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise XverseError(
                f"Weights cannot be quantized to {self.bits!r} bits.",
                "The published scheme exists for 8 and for 4 bits.",
                "Call quantize(8) or quantize(4).",
            )

    @property
    def largest(self) -> int:
        """The largest integer: 127 or 7."""
        return 2 ** (self.bits - 1) - 1

    def to_config(self) -> dict[str, object]:
        """`quantization_config` of a compressed-tensors folder, which other stacks read too."""
        weights = {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
            "group_size": None,
            "dynamic": False,
        }
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        }

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> "Scheme":
        """The scheme of a `quantization_config`; XverseError where it is not one of ours."""
        groups = config.get("config_groups")
        if config.get("quant_method") == "compressed-tensors" and isinstance(groups, Mapping):
            for group in groups.values():
                weights = group.get("weights") if isinstance(group, Mapping) else None
                bits = weights.get("num_bits") if isinstance(weights, Mapping) else None
                if bits in (4, 8) and cls(bits).to_config() == dict(config):
                    return cls(bits)
        raise XverseError(
            f"The folder is quantized by {config.get('quant_method')!r:.60} in a form that this "
            "version does not read.",
            "It reads compressed-tensors pack-quantized with one scale per row, 4 or 8 bits.",
            "Take the unquantized checkpoint and quantize it with `model.quantize(8)` or (4).",
        )
