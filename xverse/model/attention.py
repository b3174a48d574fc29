"""D -> D. Self-attention: project, rotate, hand q, k and v to the KV door, project back."""

from torch import Tensor, nn

from xverse.kernels.reference import rotate
from xverse.model.cache import KV
from xverse.model.linear import Linear
from xverse.model.shape import ModelShape


class Attention(nn.Module):
    """Multi-head or grouped-query attention; it does not know whether it trains or serves."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads, self.kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = shape.head_dim
        hidden, bias = shape.hidden_size, shape.attention_bias
        self.q_proj = Linear(hidden, self.heads * self.head_dim, bias=bias)
        self.k_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = Linear(hidden, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj: nn.Module = Linear(self.heads * self.head_dim, hidden, bias=bias)

    def forward(self, x_TD: Tensor, cos_TE: Tensor, sin_TE: Tensor, kv: KV) -> Tensor:
        split = (-1, self.head_dim)
        q_THE = rotate(self.q_proj(x_TD).unflatten(-1, split), cos_TE, sin_TE)
        k_TKE = rotate(self.k_proj(x_TD).unflatten(-1, split), cos_TE, sin_TE)
        v_TKE = self.v_proj(x_TD).unflatten(-1, split)
        mixed_THE = kv.attend(self.layer, q_THE, k_TKE, v_TKE)
        return self.o_proj(mixed_THE.flatten(-2))
