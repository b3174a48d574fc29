"""GPTQ'S TENSORS -> LAYER. Checkpoints of AutoGPTQ and GPTQModel, versions 1 and 2, 4 and 8 bits.

    qweight int32 [D * bits / 32, N]   columns of x below each other in a word
    qzeros  int32 [G, N * bits / 32]   outputs beside each other; version 1 stores zero - 1
    scales        [G, N]
    g_idx   int32 [D]                  the group of each column; with desc_act not in their order

w = (q - zero) * scale, q from 0 on. A layer holds q and zero less the middle, so that symmetric
checkpoints, whose zero is the middle, have none.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from xverse.errors import XverseError
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


class Gptq:
    """The layout of a folder with this quantization_config; XverseError for other variants."""

    method, mark = "gptq", "qweight"

    def __init__(self, config: Mapping[str, object]) -> None:
        bits = number(config, "bits", 4, 8, default=None)
        symmetric = number(config, "sym", True, False, default=True)
        number(config, "desc_act", True, False, default=False)
        key = "checkpoint_format" if "checkpoint_format" in config else "format"
        form = number(config, key, "gptq", "gptq_v2", default="gptq")
        number(config, "pack_dtype", "int32", default="int32")
        if config.get("dynamic"):
            raise not_read(config, "rules for single layers (dynamic), and one scheme is read")
        assert isinstance(bits, int)
        self.scheme = Scheme(bits, group_size_of(config), bool(symmetric))
        self.zero_less_one = form == "gptq"

    def scheme_of(self, name: str, module: nn.Module) -> Scheme | None:
        """As `Layout.scheme_of`."""
        return self.scheme if isinstance(module, Linear | StackedLinear) else None

    def read(self, scheme: Scheme, rows: int, columns: int, tensors: LayerTensors) -> Parts:
        """As `Layout.read`."""
        bits, groups = scheme.bits, columns // (scheme.group_size or columns)
        per_word = 32 // bits
        if columns % per_word or rows % per_word:
            raise _unequal(f"its {rows} x {columns} weights are no whole words")
        words = tensors.read("qweight", (columns // per_word, rows), torch.int32)
        steps = signed(from_words(words.t(), bits, columns), bits)
        words = tensors.read("qzeros", (groups, rows // per_word), torch.int32)
        stored = from_words(words, bits, rows).to(torch.int16)
        # Version 1 stores 15 for a zero of 0: its kernels keep the lowest bits of zero - 1.
        zero = (stored + self.zero_less_one) % 2**bits
        zero = signed(zero, bits).t()
        scale = tensors.read("scales", (groups, rows), tensors.dtype).t()
        order = self._order(scheme, groups, columns, tensors)
        if order is not None:
            steps = steps[:, order]
        if scheme.symmetric and bool(zero.any()):
            raise _unequal("it is said to be symmetric, and its zeros are not the middle")
        kept = None if scheme.symmetric else zero.contiguous()
        if scheme.group_size is None:
            scale, kept = scale[:, 0], None if kept is None else kept[:, 0]
        weight = pack_nibbles(steps) if bits == 4 else steps.contiguous()
        return Parts(weight, scale.contiguous(), kept, order)

    def _order(
        self, scheme: Scheme, groups: int, columns: int, tensors: LayerTensors
    ) -> Tensor | None:
        """The columns sorted by group; None where they are so already."""
        if tensors.shape("g_idx") is None:
            return None
        group_of = tensors.read("g_idx", (columns,), torch.int64)
        size = columns // groups
        expected = torch.arange(columns) // size
        if torch.equal(group_of, expected):
            return None
        order = group_of.argsort(stable=True)
        if not torch.equal(group_of[order], expected):
            raise _unequal(f"its g_idx does not put {size} columns into each group")
        return order


def _unequal(why: str) -> XverseError:
    return XverseError(
        "A GPTQ layer does not fit its quantization_config.",
        f"{why[0].upper()}{why[1:]}.",
        "Fetch the folder again, or take another one of the model.",
    )
