"""AWQ'S TENSORS -> LAYER. Checkpoints of AutoAWQ in its packing "gemm", 4 bits.

    qweight int32 [D, N / 8]   eight outputs in a word, in the order of `PLACES`
    qzeros  int32 [G, N / 8]   likewise
    scales        [G, N]

w = (q - zero) * scale, q from 0 on.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xverse.kernels.reference_steps import pack_nibbles
from xverse.model.linear import Linear, StackedLinear
from xverse.quant.scheme import Scheme
from xverse.quant.stored_layer import (
    LayerTensors,
    Parts,
    from_words,
    group_size_of,
    not_read,
    number,
    signed,
)

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its word each of eight outputs lies, lowest bits first


class Awq:
    """The layout of a folder with this quantization_config; XverseError for other variants."""

    method, mark = "awq", "qweight"

    def __init__(self, config: Mapping[str, object]) -> None:
        number(config, "bits", 4, default=4)
        number(config, "zero_point", True, default=True)
        version = config.get("version", "gemm")
        if str(version).lower() != "gemm":
            raise not_read(config, f"version = {version!r:.60}, and read is 'gemm'")
        self.scheme = Scheme(4, group_size_of(config), symmetric=False)

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """As `Layout.scheme_of`."""
        return self.scheme if isinstance(module, Linear | StackedLinear) else None

    def read(self, scheme: Scheme, rows: int, columns: int, tensors: LayerTensors) -> Parts:
        """As `Layout.read`."""
        groups = columns // (scheme.group_size or columns)
        weight = _values(tensors.read("qweight", (columns, -(-rows // 8)), torch.int32), rows)
        scale = tensors.read("scales", (groups, rows), tensors.dtype).t().contiguous()
        zero = _values(tensors.read("qzeros", (groups, -(-rows // 8)), torch.int32), rows)
        if scheme.group_size is None:
            scale, zero = scale[:, 0], zero[:, 0]
        return Parts(pack_nibbles(weight), scale, zero)


def _values(words: Tensor, rows: int) -> Tensor:
    """int32 [K, N / 8] -> int8 [N, K], where the middle is 0."""
    values = from_words(words, 4, words.shape[1] * 8).view(len(words), -1, 8)
    return signed(values[..., list(PLACES)].flatten(1)[:, :rows], 4).t().contiguous()
