"""IDS -> D, AND D -> LOGITS. The table of token vectors, which of a tied model is its head, too."""

from torch import Tensor, nn

from xverse.kernels import multiply
from xverse.kernels.look_up import look_up
from xverse.model.linear import Linear


class Embedding(nn.Embedding):
    """One row for each token; weight [V, D]. A quantized one may stand in its place."""

    def forward(self, input: Tensor) -> Tensor:
        return look_up(input, self.weight)

    def project(self, x_TD: Tensor) -> Tensor:
        """Scores of every row, [T, V]: what a tied head computes."""
        return multiply.linear(x_TD, self.weight)

    def as_linear(self) -> Linear:
        """The layer that `project` is, on the same memory."""
        return Linear.of(self.weight.data, None)
