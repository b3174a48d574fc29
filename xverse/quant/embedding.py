"""EMBEDDING -> SMALLER EMBEDDING. Token vectors in integers, and the tied head that they are."""

from torch import Tensor

from xverse.quant.linear import QuantizedLinear


class QuantizedEmbedding(QuantizedLinear):
    """A `QuantizedLinear` of [V, D] that stands in the place of an `Embedding`."""

    def forward(self, ids_T: Tensor, expert: int | None = None) -> Tensor:
        """The vectors of ids, [..., D], in the dtype of the scales."""
        assert expert is None, "an embedding has none"
        return self.dequantized(ids_T)

    def project(self, x_TD: Tensor) -> Tensor:
        """As `Embedding.project`."""
        return super().forward(x_TD)

    def as_linear(self) -> QuantizedLinear:
        """As `Embedding.as_linear`."""
        return QuantizedLinear(self.weight, self.scale, None, self.scheme, self.zero, self.order)
