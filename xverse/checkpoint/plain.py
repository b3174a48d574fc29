"""FOLDER -> PLAIN WEIGHTS. The weights of any model as numbers, whatever they are stored as."""

from collections.abc import Mapping

import torch
from torch import Tensor

from xverse.checkpoint.gguf import GgufFile
from xverse.checkpoint.gguf_weights import GgufWeights
from xverse.checkpoint.load import Checkpoint
from xverse.checkpoint.quantized import (
    LayerFiles,
    is_zero_bias,
    plain_matrix,
    put_places,
    quantized_layers,
    size_of,
    stored_names,
)
from xverse.checkpoint.weights import TensorInfo, Weights, open_weights
from xverse.model.decoder import Decoder
from xverse.quant.linear import QuantizedLinear
from xverse.quant.stored import layout_of
from xverse.quant.stored_layer import Layout


def plain_weights(checkpoint: Checkpoint) -> Weights:
    """The weights of `checkpoint` under Hugging Face names, one tensor at a time.

    Those of a quantized folder are computed back to fp32 as each is read.
    """
    if checkpoint.path.is_file():
        return GgufWeights(GgufFile.open(checkpoint.path))
    weights = open_weights(checkpoint.path)
    quantized = checkpoint.config.get("quantization_config")
    if not isinstance(quantized, Mapping):
        return weights
    layout, infos = layout_of(quantized), weights.infos()
    with torch.device("meta"):
        decoder = Decoder(checkpoint.shape)
    put_places(decoder, layout, infos)
    layers = {
        stored: layer
        for name, layer in quantized_layers(decoder)
        for stored in stored_names(name, layer)
    }
    return _Dequantized(weights, layout, layers)


class _Dequantized:
    """The weights of a quantized folder, its layers by the names that they had before."""

    def __init__(
        self, weights: Weights, layout: Layout, layers: Mapping[str, QuantizedLinear]
    ) -> None:
        self._weights, self._layout, self._layers = weights, layout, layers
        self._stored = weights.infos()
        self._infos = self._plain_infos()

    def _plain_infos(self) -> dict[str, TensorInfo]:
        infos = {}
        for name, info in self._stored.items():
            above, _, what = name.rpartition(".")
            if above not in self._layers or what == "bias":
                infos[name] = info
        for name, layer in self._layers.items():
            shape, bias = size_of(layer), f"{name}.bias"
            file = self._stored[f"{name}.{self._layout.mark}"].file
            infos[f"{name}.weight"] = TensorInfo(
                shape, torch.float32, 4 * shape[0] * shape[1], file
            )
            if layer.bias is None and is_zero_bias(self._weights, self._stored, bias):
                del infos[bias]
        return infos

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by name, quantized ones as the fp32 that they are computed in."""
        return dict(self._infos)

    def read(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor `name` in `dtype`."""
        prefix, _, what = name.rpartition(".")
        layer = self._layers.get(prefix)
        if layer is None or what == "bias":
            return self._weights.read(name, dtype)
        files = LayerFiles(self._weights, self._stored, prefix)
        return plain_matrix(files.parts(self._layout, layer, torch.float32), layer).to(dtype)
