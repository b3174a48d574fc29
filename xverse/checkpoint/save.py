"""MODEL -> TENSORS ON DISK. Published names: experts one by one, quantized layers packed."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from xverse.model.decoder import Decoder
from xverse.model.linear import StackedLinear
from xverse.quant.linear import QuantizedLinear
from xverse.quant.stored_compressed import to_disk


def published_tensors(
    decoder: Decoder, state: Mapping[str, Tensor] | None = None, *, within: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a decoder (that is not fused) under their names on disk.

    `state`, a state dict of the same decoder, stands in for its own weights. `within` names a
    module, of which alone the tensors are given.
    """
    state = decoder.state_dict() if state is None else state
    for prefix, module in decoder.get_submodule(within).named_modules(prefix=within):
        if isinstance(module, QuantizedLinear):
            yield from _quantized(prefix, module)
        elif isinstance(module, StackedLinear):
            for number, weight in enumerate(state[f"{prefix}.weight"]):
                yield f"{expert_name(prefix, number)}.weight", weight
        else:
            for name, _ in module.named_parameters(recurse=False):
                yield f"{prefix}.{name}", state[f"{prefix}.{name}"]


def _quantized(prefix: str, layer: QuantizedLinear) -> Iterator[tuple[str, Tensor]]:
    stacked = layer.weight.dim() == 3
    for number in range(len(layer.weight)) if stacked else (None,):
        name = prefix if number is None else expert_name(prefix, number)
        for what, tensor in to_disk(_one(layer, number)).items():
            yield f"{name}.{what}", tensor


def _one(layer: QuantizedLinear, number: int | None) -> QuantizedLinear:
    """The layer, or that of one expert of a stack, on the CPU."""
    at = ... if number is None else number
    zero = None if layer.zero is None else layer.zero[at].cpu()
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    weight, scale = layer.weight[at].cpu(), layer.scale[at].cpu()
    return QuantizedLinear(weight, scale, bias, layer.scheme, zero, layer.order_of(number))


def expert_name(prefix: str, number: int) -> str:
    """Published name of one layer of a stack: `experts.gate_proj` -> `experts.0.gate_proj`."""
    above, _, projection = prefix.rpartition(".")
    return f"{above}.{number}.{projection}"
