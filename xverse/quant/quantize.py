"""MODEL -> SMALLER MODEL. Put quantized layers in the place of the linear ones."""

from collections.abc import Callable
from typing import cast

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
        raise _quantized_already()
    return replace_linears(decoder, lambda layer: QuantizedLinear.of(layer, scheme))


def quantize_module(name: str, module: nn.Module, bits: int) -> nn.Module:
    """What `quantize` makes of the module `name` of a decoder; for one that is being loaded."""
    if isinstance(module, QuantizedLinear):
        raise _quantized_already()
    linear = isinstance(module, Linear | StackedLinear) and name.startswith("model.layers.")
    if not linear or name.endswith(".router"):
        return module
    return QuantizedLinear.of(cast(Linear | StackedLinear, module), Scheme(bits))


def _quantized_already() -> XverseError:
    return XverseError(
        "This model is quantized already.",
        "Rounding rounded weights again would only lose more.",
        "Load the unquantized checkpoint and quantize that.",
    )


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
