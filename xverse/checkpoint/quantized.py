"""FILES -> QUANTIZED LAYERS. Where they go in a decoder, and which tensors they are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xverse.checkpoint.save import expert_name
from xverse.checkpoint.weights import TensorInfo, Weights
from xverse.errors import XverseError
from xverse.files import DOWNLOAD_AGAIN
from xverse.model.decoder import Decoder
from xverse.model.linear import StackedLinear
from xverse.quant.linear import QuantizedLinear
from xverse.quant.quantize import rounded_layer
from xverse.quant.stored_layer import Layout, Parts

WIDE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDICES = (torch.int32, torch.int64)


def put_places(decoder: Decoder, layout: Layout, infos: Mapping[str, TensorInfo]) -> None:
    """Exchange the layers that the files hold quantized for empty ones of their kind, in place.

    Of the layers that the format has a scheme for, some may be stored as they were; XverseError
    where all are.
    """
    put = 0
    for name, module in list(decoder.named_modules()):
        scheme = layout.scheme_of(name, module)
        first = expert_name(name, 0) if isinstance(module, StackedLinear) else name
        if scheme is None or f"{first}.{layout.mark}" not in infos:
            continue
        columns = getattr(module, "weight").shape[-1]  # noqa: B009 - any module may have it
        if scheme.group_size is not None and columns % scheme.group_size:
            raise XverseError(
                f"{name} has {columns} inputs, which are no whole groups of {scheme.group_size}.",
                "config.json describes another model than the one stored, or its last group is "
                "shorter, which this version does not read.",
                "Take the unquantized checkpoint, and quantize it with `xverse quantize`.",
            )
        with torch.device("meta"):
            decoder.set_submodule(name, rounded_layer(name, module, scheme))
        put += 1
    if not put:
        raise XverseError(
            f"config.json says that the model is quantized by {layout.method}, and it is not.",
            f"No layer in the files has a {layout.mark}.",
            "Fetch the folder again, or take quantization_config out of its config.json.",
        )


def stored_names(name: str, layer: QuantizedLinear) -> list[str]:
    """What the layer `name` is called in files: itself, or each expert of a stack."""
    experts = layer.weight.shape[:-2]
    return [expert_name(name, number) for number in range(experts[0])] if experts else [name]


def size_of(layer: QuantizedLinear) -> tuple[int, int]:
    """Rows and columns of the layer, or of each of a stack."""
    return layer.weight.shape[-2], layer.inputs


class LayerFiles:
    """The stored tensors of the layer `name`; keeps the names that were asked for in `asked`."""

    def __init__(self, weights: Weights, infos: Mapping[str, TensorInfo], name: str) -> None:
        self._weights, self._infos, self._name = weights, infos, name
        self.dtype = torch.float32
        self.asked: set[str] = set()

    def parts(self, layout: Layout, layer: QuantizedLinear, dtype: torch.dtype) -> Parts:
        """The layer as it is stored, on the CPU, its scales in `dtype`."""
        self.dtype = dtype
        return layout.read(layer.scheme, *size_of(layer), self)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """As `LayerTensors.shape`."""
        info = self._infos.get(f"{self._name}.{name}")
        return None if info is None else info.shape

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `LayerTensors.read`."""
        name = f"{self._name}.{name}"
        expect(self._infos, name, shape)
        self.asked.add(name)
        stored = self._infos[name].dtype
        if stored != dtype and not any({stored, dtype} <= {*kind} for kind in (WIDE, INDICES)):
            raise XverseError(
                f"{self._infos[name].file}: {name} is of {stored}, and {dtype} is wanted.",
                "config.json describes another way of quantizing than the one stored.",
                DOWNLOAD_AGAIN,
            )
        return self._weights.read(name, dtype)


def expect(infos: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]) -> None:
    """Raise XverseError unless the files hold the tensor `name` in this shape."""
    info = infos.get(name)
    if info is None:
        raise XverseError(
            f"The weights lack {name!r}.",
            f"The model described by config.json needs it, and the {len(infos)} tensors "
            "found do not have it.",
            "Fetch the folder again; a download may have stopped half way.",
        )
    if info.shape != shape:
        raise XverseError(
            f"{info.file}: {name} is {list(info.shape)}, and the model needs {list(shape)}.",
            "config.json and the weights belong to different models.",
            "Fetch both from the same place again.",
        )


def put_parts(layer: QuantizedLinear, parts: list[Parts], device: torch.device) -> None:
    """Put what is stored into the empty `layer`; of a stack, the parts of all experts."""
    stacked = layer.weight.dim() == 3
    if any(one.order is not None for one in parts):
        parts = [_with_order(one, layer.inputs) for one in parts]
    for name in Parts._fields:
        tensors = [getattr(one, name) for one in parts]
        if tensors[0] is None:
            setattr(layer, name, None)
        else:
            joined = torch.stack(tensors) if stacked else tensors[0]
            # Kernels read rows as they lie; some formats store columns.
            setattr(layer, name, joined.to(device).contiguous())


def _with_order(parts: Parts, columns: int) -> Parts:
    """The same with an order, of columns that lie as they should: in a stack all have one."""
    return parts if parts.order is not None else parts._replace(order=torch.arange(columns))


def is_zero_bias(weights: Weights, infos: Mapping[str, TensorInfo], name: str) -> bool:
    """Whether `name` is a bias of zeros, which AutoGPTQ wrote for layers that have none."""
    info = infos.get(name)
    return info is not None and not bool(weights.read(name, info.dtype).any())


def plain_matrix(parts: Parts, layer: QuantizedLinear) -> Tensor:
    """The numbers that a stored layer stands for, [rows, columns], in the dtype of its scales."""
    one = QuantizedLinear(parts.weight, parts.scale, None, layer.scheme, parts.zero)
    matrix = one.dequantized()
    if parts.order is None:
        return matrix
    inverse = torch.empty_like(parts.order)
    inverse[parts.order] = torch.arange(len(parts.order))
    return matrix[:, inverse]


def quantized_layers(decoder: Decoder) -> list[tuple[str, QuantizedLinear]]:
    """Every quantized layer of a decoder, by name."""
    modules: list[tuple[str, nn.Module]] = list(decoder.named_modules())
    return [(name, module) for name, module in modules if isinstance(module, QuantizedLinear)]
