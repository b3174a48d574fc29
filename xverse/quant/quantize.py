"""MODEL -> SMALLER MODEL. Put quantized layers in the place of the linear ones."""

from collections.abc import Callable

from torch import nn

from xverse.errors import XverseError
from xverse.model.decoder import Decoder
from xverse.quant.embedding import QuantizedEmbedding
from xverse.quant.linear import QuantizedLinear
from xverse.quant.recipe import EMBEDDING, Recipe
from xverse.quant.scheme import Scheme


def quantize(decoder: Decoder, what: int | str | Scheme | Recipe) -> Decoder:
    """Round weights in place, layer by layer, no copy: 8 or 4 (bits, the published schemes), a
    name such as "int4", a scheme, or a recipe.

    Raises XverseError for others, and for a decoder that is quantized already.
    """
    recipe = Recipe.of(what).fitting(decoder.shape)
    if any(isinstance(module, QuantizedLinear) for module in decoder.modules()):
        raise _quantized_already()
    return replace_layers(decoder, recipe, rounded_layer)


def quantize_module(name: str, module: nn.Module, recipe: Recipe) -> nn.Module:
    """What `quantize` makes of the module `name` of a decoder; for one that is being loaded."""
    if isinstance(module, QuantizedLinear):
        raise _quantized_already()
    scheme = recipe.scheme_of(name, module)
    return module if scheme is None else rounded_layer(name, module, scheme)


def rounded_layer(name: str, module: nn.Module, scheme: Scheme) -> QuantizedLinear:
    """The layer `name` with each weight rounded to the nearest step."""
    return kind_of(name).of(module, scheme)


def kind_of(name: str) -> type[QuantizedLinear]:
    """What a quantized module `name` is."""
    return QuantizedEmbedding if name == EMBEDDING else QuantizedLinear


def replace_layers(
    decoder: Decoder,
    recipe: Recipe,
    replacement: Callable[[str, nn.Module, Scheme], nn.Module],
) -> Decoder:
    """Exchange every layer that the recipe has a scheme for, in place."""
    for name, module in list(decoder.named_modules()):
        scheme = recipe.scheme_of(name, module)
        if scheme is not None:
            decoder.set_submodule(name, replacement(name, module, scheme))
    return decoder


def _quantized_already() -> XverseError:
    return XverseError(
        "This model is quantized already.",
        "Rounding rounded weights again would only lose more.",
        "Load the unquantized checkpoint and quantize that.",
    )
