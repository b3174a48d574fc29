"""MODEL -> SMALLER MODEL. Put quantized layers in the place of the linear ones."""

from collections.abc import Callable

from torch import nn

from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.model.linear import Linear, StackedLinear
from xverse.quant.linear import QuantizedLinear
from xverse.quant.scheme import Scheme


def quantize(decoder: Decoder, bits: int) -> Decoder:
    """Round the linear layers of every block to 8 or 4 bits, in place; layer by layer, no copy.

    Raises XverseError for other widths, and for a decoder that is quantized already.
    """
    scheme = Scheme(bits)
    if any(isinstance(module, QuantizedLinear) for module in decoder.modules()):
        raise XverseError(
            "This model is quantized already.",
            "Rounding rounded weights again would only lose more.",
            "Load the unquantized checkpoint and quantize that.",
        )
    return replace_linears(decoder, lambda layer: QuantizedLinear.of(layer, scheme))


def replace_linears(
    decoder: Decoder, replacement: Callable[[Linear | StackedLinear], nn.Module]
) -> Decoder:
    """Exchange the linear layers of every block, the router's excepted, in place."""
    for block in decoder.model.layers:
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, Linear | StackedLinear) and name != "router":
                    setattr(parent, name, replacement(child))
    return decoder
