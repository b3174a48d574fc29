"""MODEL -> TENSORS ON DISK. Published names: experts one by one, quantized layers packed."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from xverse.model.decoder import Decoder
from xverse.model.linear import StackedLinear
from xverse.quant.linear import QuantizedLinear, to_disk


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
    bias = None if layer.bias is None else layer.bias.detach().cpu()
    weight, scale = layer.weight.cpu(), layer.scale.cpu()
    if weight.dim() == 2:
        one = QuantizedLinear(weight, scale, bias, layer.scheme)
        yield from ((f"{prefix}.{name}", tensor) for name, tensor in to_disk(one).items())
        return
    for number in range(len(weight)):
        one = QuantizedLinear(weight[number], scale[number], None, layer.scheme)
        for name, tensor in to_disk(one).items():
            yield f"{expert_name(prefix, number)}.{name}", tensor


def expert_name(prefix: str, number: int) -> str:
    """Published name of one layer of a stack: `experts.gate_proj` -> `experts.0.gate_proj`."""
    above, _, projection = prefix.rpartition(".")
    return f"{above}.{number}.{projection}"
