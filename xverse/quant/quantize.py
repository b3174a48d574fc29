"""MODEL -> SMALLER MODEL. Put quantized layers in the place of the linear ones."""

from collections.abc import Sequence

from torch import Tensor, nn

from xverse.errors import XverseError
from xverse.log import progress
from xverse.model.decoder import Decoder
from xverse.quant.calibrate import CALIBRATED, Method, choose_method, quantize_block, relative_error
from xverse.quant.embedding import QuantizedEmbedding
from xverse.quant.linear import QuantizedLinear
from xverse.quant.passage import Passage
from xverse.quant.recipe import EMBEDDING, Recipe
from xverse.quant.rounding import nearest, searched
from xverse.quant.scheme import Scheme


def quantize(
    decoder: Decoder,
    what: int | str | Scheme | Recipe,
    samples: Sequence[Sequence[int]] | None = None,
    *,
    method: Method = "auto",
) -> Decoder:
    """Round weights in place, block by block: 8 or 4 (bits, the published schemes), a name such
    as "int4", a scheme, or a recipe.

    `samples` are rows of token ids to calibrate with. The method is "rtn" (the nearest steps),
    "search" (of scales), "gptq" or "awq"; "auto" takes what suits. Raises XverseError for others,
    and for a decoder that is quantized already.
    """
    recipe = Recipe.of(what).fitting(decoder.shape)
    if any(isinstance(module, QuantizedLinear) for module in decoder.modules()):
        raise quantized_already()
    chosen = choose_method(method, recipe.scheme, samples=bool(samples))
    passage = Passage(decoder, samples) if samples and chosen in CALIBRATED else None
    blocks = decoder.model.layers
    for block in progress(blocks, total=len(blocks), label="quantizing"):
        quantize_block(block, recipe.scheme, chosen, passage)
    quantize_ends(decoder, recipe, chosen)
    return decoder


def quantize_ends(decoder: Decoder, recipe: Recipe, method: Method) -> dict[str, float]:
    """Round head and embedding, as far as the recipe has schemes for them; gives the relative
    error of their weights. They are not calibrated, as 8 bits lose little without it."""
    errors = {}
    for name in ("lm_head", EMBEDDING):
        module = decoder.get_submodule(name) if name == EMBEDDING else decoder.lm_head
        scheme = None if module is None else recipe.scheme_of(name, module)
        if module is None or scheme is None:
            continue
        weight = module.weight
        assert isinstance(weight, Tensor), "a layer that has a scheme has a weight"
        plain = method == "rtn" or scheme.kind == "float"
        rounded = (nearest if plain else searched)(weight.detach(), scheme)
        errors[name] = relative_error(weight[None], rounded, scheme)
        decoder.set_submodule(name, kind_of(name).of_rounded(module, rounded, scheme))
    return errors


def quantize_module(
    name: str, module: nn.Module, recipe: Recipe, *, search: bool = False
) -> nn.Module:
    """What `quantize` makes of the module `name` of a decoder; for one that is being loaded.

    Each weight goes to the nearest step; with `search`, of the scales that suit the weights best.
    """
    if isinstance(module, QuantizedLinear):
        raise quantized_already()
    scheme = recipe.scheme_of(name, module)
    if scheme is None:
        return module
    if not search:
        return rounded_layer(name, module, scheme)
    weight = module.weight
    assert isinstance(weight, Tensor), "a layer that has a scheme has a weight"
    return kind_of(name).of_rounded(module, searched(weight.detach(), scheme), scheme)


def rounded_layer(name: str, module: nn.Module, scheme: Scheme) -> QuantizedLinear:
    """The layer `name` with each weight rounded to the nearest step."""
    return kind_of(name).of(module, scheme)


def kind_of(name: str) -> type[QuantizedLinear]:
    """What a quantized module `name` is."""
    return QuantizedEmbedding if name == EMBEDDING else QuantizedLinear


def quantized_already() -> XverseError:
    """The refusal to quantize twice."""
    return XverseError(
        "This model is quantized already.",
        "Rounding rounded weights again would only lose more.",
        "Load the unquantized checkpoint and quantize that.",
    )
